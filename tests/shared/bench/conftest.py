"""A stand with a clock that tells made-up times, and result files of made-up figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.bench.machine import Machine
from shared.bench.results import Record, Row
from shared.bench.stand import Stand


class CountingClock:
    """Every call takes a millisecond more than the one before."""

    how = "counted by a test"
    headline = "least"
    least_warm_ups = 1

    def __init__(self) -> None:
        self.ms = 0.0

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        self.ms += 1
        return self.ms, work()


@pytest.fixture
def clock() -> CountingClock:
    return CountingClock()


@pytest.fixture
def stand(tmp_path: Path, clock: CountingClock) -> Stand:
    return Stand(device=torch.device("cpu"), clock=clock, peers=frozenset({"P1"}), folder=tmp_path, repeats=1)


@pytest.fixture
def machine() -> Machine:
    return Machine(cpu="Some CPU", cores=4, ram_gb=16.0)


@pytest.fixture
def record() -> Record:
    return made_up("C1", "2026-01-02T03:04:05Z", ours=4.0, peer=14.0)


def made_up(case: str, date: str, *, ours: float, peer: float) -> Record:
    """A record whose one row is a forward of ours and diffusers'."""
    rows = (
        Row("one forward", "ours", {"ms": ours, "ms_spread": 0.1, "repeats": 10, "error": 0.01}),
        Row("one forward", "P1", {"ms": peer, "ms_spread": 0.2, "repeats": 10, "error": 0.02}),
    )
    return Record(
        case=case, date=date, commit="abcdef123", command=f"python wgp.py bench --cases {case}", how="by a test",
        versions={"python": "3.11", "torch": "2.13.0+cpu"}, rows=rows, notes=("A note.",),
    )  # fmt: skip

"""Turns, warm-ups and the figures made of them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from shared.bench.measure import CpuClock, CudaClock, Timing, interleave, reason_of


def test_contenders_take_turns_forth_and_back(clock: Any) -> None:
    order: list[str] = []
    contenders = {name: lambda name=name: order.append(name) for name in "ABC"}

    interleave(contenders, clock, repeats=3, warm_ups=1)

    assert "".join(order) == "ABC" + "ABC" + "CBA" + "ABC"


def test_warm_ups_are_not_timed_and_their_first_result_is_kept(clock: Any) -> None:
    answers = iter(range(100))

    found = interleave({"A": lambda: next(answers)}, clock, repeats=2, warm_ups=3)

    assert found.results == {"A": 0}
    assert found.timings["A"].ms == (1.0, 2.0)
    assert found.failures == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GB", "out of memory"),
        ("MemoryError: ", "out of memory"),
        ("\n  RuntimeError: no\nmore", "RuntimeError: no"),
        ("", "no reason given"),
    ],
)
def test_a_failure_is_told_in_a_few_words(text: str, reason: str) -> None:
    assert reason_of(text) == reason


def test_few_repeats_are_slow_rows_and_warm_up_once(clock: Any) -> None:
    calls: list[int] = []

    interleave({"A": lambda: calls.append(1)}, clock, repeats=2)
    slow = len(calls)
    interleave({"A": lambda: calls.append(1)}, clock, repeats=10)

    assert (slow, len(calls) - slow) == (3, 13)


def test_a_gpus_slow_rows_warm_up_until_forwards_are_recorded(clock: Any) -> None:
    calls: list[int] = []
    clock.least_warm_ups = CudaClock.least_warm_ups

    interleave({"A": lambda: calls.append(1)}, clock, repeats=2)

    assert len(calls) == 2 + 2


def test_a_row_keeps_the_figure_that_counts_and_the_spread_beside_it() -> None:
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0))

    assert timing.values("least") == {
        "ms": 1.0, "ms_least": 1.0, "ms_median": 3.0, "ms_spread": 2.0, "repeats": 5,
    }  # fmt: skip
    assert timing.values("median")["ms"] == 3.0
    assert Timing((7.0,)).spread == 0.0


def test_the_cpu_clock_does_not_count_waiting() -> None:
    ms, result = CpuClock().time(lambda: time.sleep(0.05) or "done")

    assert result == "done"
    assert ms < 25


def test_the_gpu_clock_waits_for_the_second_event(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.name = f"event {len([h for h in happened if h.startswith('made')])}"
            happened.append(f"made {self.name}")

        def record(self) -> None:
            happened.append(f"record {self.name}")

        def elapsed_time(self, other: Event) -> float:
            happened.append(f"from {self.name} to {other.name}")
            return 12.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))

    ms, result = CudaClock().time(lambda: happened.append("work") or 1)

    assert (ms, result) == (12.5, 1)
    assert happened[2:] == [
        "wait", "record event 0", "work", "record event 1", "wait", "from event 0 to event 1",
    ]  # fmt: skip

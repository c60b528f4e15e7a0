"""What a case function may ask of the stand that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

Value = float | int | str


class Counts(Protocol):
    """Exact counts of one call."""

    ops: int
    views: int
    host_reads: int
    bytes_moved: int
    scratch_bytes: int

    def gated(self) -> dict[str, int]: ...


class Row(Protocol):
    """A contender's figures in one comparison."""

    @property
    def row(self) -> str: ...
    @property
    def who(self) -> str: ...
    @property
    def values(self) -> Mapping[str, Value]: ...


class Stand(Protocol):
    """device: where to compute. peers: keys of the peers this run wants. folder: for files, emptied afterwards.

    how: the way figures are taken, in words. rows: what came out so far.
    """

    device: torch.device
    peers: frozenset[str]
    folder: Path
    how: str

    @property
    def rows(self) -> Sequence[Row]: ...

    def compare(
        self,
        row: str,
        contenders: Mapping[str, Callable[[], Any]],
        *,
        reference: Tensor | str | None = None,
        repeats: int = 10,
        facts: Mapping[str, Mapping[str, Value]] | None = None,
        memory: bool = False,
        pictures: bool = False,
    ) -> dict[str, float]:
        """Time them in turns; one row each, with the error of what they return against the reference: who -> ms.

        reference: a result, or whose result it is. memory: keep the most that a call takes on the GPU. pictures: keep
        SSIM and PSNR of results that are pictures in [-1, 1]. Who fails has a row that says why, and is not in what is
        returned.
        """

    def record(self, row: str, who: str, values: Mapping[str, Value]) -> None:
        """Keep what was measured otherwise."""

    def count(self, work: Callable[[], Any]) -> Counts:
        """Run it once and count."""

    def wants(self, who: str) -> bool:
        """Whether a contender ("ours ...", "raw", a peer's key) takes part in this run."""

    def note(self, text: str) -> None:
        """Keep a sentence about the run."""

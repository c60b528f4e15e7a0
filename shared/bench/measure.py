"""How time is taken: contenders in turns A B C, C B A, ..., in one process, on one thread or by the GPU's own clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Work = Callable[[], Any]

# Below this many repeats a row is slow, and one warm-up has to do.
MANY = 10
WARM_UPS = 3


class Clock(Protocol):
    """Times one call. `how`: in words, for the record. `headline`: which figure of a row counts.

    least_warm_ups: untimed calls that even slow work gets.
    """

    how: str
    headline: str
    least_warm_ups: int

    def time(self, work: Work) -> tuple[float, Any]:
        """(milliseconds, what work() returned)."""


class CpuClock:
    """CPU time of this process: what other programs do to a shared machine's wall clock does not enter it."""

    how = "CPU time of one thread, least of the repeats"
    headline = "least"
    least_warm_ups = 1

    def time(self, work: Work) -> tuple[float, Any]:
        began = time.process_time()
        result = work()
        return (time.process_time() - began) * 1e3, result


class CudaClock:
    """The time between two events on the GPU's stream, the host waiting for the second."""

    how = "CUDA events, median of the repeats"
    headline = "median"
    least_warm_ups = 2  # the second call records what later ones replay

    def time(self, work: Work) -> tuple[float, Any]:
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        result = work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)), result


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one contender's repeats, in the order they were taken."""

    ms: tuple[float, ...]

    @property
    def least(self) -> float:
        return min(self.ms)

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def spread(self) -> float:
        """The distance between the first and the third quartile; 0 of a single repeat."""
        if len(self.ms) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.ms, n=4, method="inclusive")
        return third - first

    def values(self, headline: str) -> dict[str, float | int]:
        """What a row of the results keeps, `ms` being the figure that counts."""
        figures = {"ms": getattr(self, headline), "ms_least": self.least, "ms_median": self.median}
        figures["ms_spread"] = self.spread
        return {name: round(ms, 4) for name, ms in figures.items()} | {"repeats": len(self.ms)}


@dataclass(frozen=True, slots=True)
class Taken:
    """By contender: its times, what it returned the first time, the reason why it has neither."""

    timings: Mapping[str, Timing]
    results: Mapping[str, Any]
    failures: Mapping[str, str]


def interleave(contenders: Mapping[str, Work], clock: Clock, *, repeats: int, warm_ups: int | None = None) -> Taken:
    """Time all contenders in turns. One that fails, for want of memory or whatever, leaves the others their turns.

    warm_ups: untimed turns before; None takes WARM_UPS, or the clock's least where repeats are few as calls are slow.
    """
    if warm_ups is None:
        warm_ups = WARM_UPS if repeats >= MANY else clock.least_warm_ups
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    taken: dict[str, list[float]] = {name: [] for name in contenders}

    def warm_up(name: str) -> None:
        result = contenders[name]()
        results.setdefault(name, result)

    def time_it(name: str) -> None:
        taken[name].append(clock.time(contenders[name])[0])

    names = list(contenders)
    turns = [(warm_up, names)] * max(warm_ups, 1)
    turns += [(time_it, names if turn % 2 == 0 else names[::-1]) for turn in range(repeats)]
    for do, order in turns:
        for name in order:
            if name not in failures and (reason := failure(lambda do=do, name=name: do(name))):  # type: ignore[misc]
                failures[name] = reason
                results.pop(name, None)
    timings = {name: Timing(tuple(ms)) for name, ms in taken.items() if name not in failures}
    return Taken(timings, results, failures)


OUT_OF_MEMORY = "out of memory"
_REASON_LETTERS = 120


def failure(work: Work) -> str:
    """Do the work and return "", or in a line why it failed, with the GPU's memory given back."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - whatever a peer's library raises is this contender's result
        reason = reason_of(f"{type(error).__name__}: {error}")
    else:
        return ""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return reason


def reason_of(text: str) -> str:
    """A failure in a few words: that memory ran out, or the text's first line that says something."""
    if OUT_OF_MEMORY in text.lower() or "OutOfMemory" in text or text.startswith("MemoryError"):
        return OUT_OF_MEMORY
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")[:_REASON_LETTERS]

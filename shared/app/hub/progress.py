"""How far a download is, told in reports that people can read, and that it was cancelled."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shared.quant.errors import RunError

REPORT_SECONDS = 0.1  # at most ten progress reports a second
SPEED_WINDOW_SECONDS = 5.0
OnProgress = Callable[["DownloadProgress"], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far one file is: bytes done and in all (None: unknown), speed over the last seconds."""

    file: str
    done: int
    total: int | None
    bytes_per_second: float


class DownloadCancelled(RunError):
    """The user stopped a download; what has arrived is kept and continued by the next one."""


class Meter:
    """Turns byte counts into progress reports, not more often than people can read them."""

    def __init__(self, name: str, total: int, on_progress: OnProgress | None) -> None:
        self.name = name
        self._total = total
        self._on_progress = on_progress
        self._marks: deque[tuple[float, int]] = deque()
        self._reported = 0.0

    def moved(self, done: int) -> None:
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self.report(done)

    def report(self, done: int) -> None:
        now = self._reported = time.monotonic()
        self._marks.append((now, done))
        while now - self._marks[0][0] > SPEED_WINDOW_SECONDS:
            self._marks.popleft()
        since, at_first = self._marks[0]
        if self._on_progress is not None:
            speed = max(0.0, (done - at_first) / (now - since)) if now > since else 0.0
            self._on_progress(DownloadProgress(self.name, done, self._total, speed))


def size_words(count: int) -> str:
    """Bytes for people: "2.1 GB"."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"

"""Memory of a process as Linux tells it, and the most of it while something runs.

What a process holds is of two kinds: its own (RssAnon), and pages of files that it has mapped (RssFile). The second are
the page cache's; the system takes them back when it wants the memory, and reads them again. VmRSS is both.
"""

from __future__ import annotations

import threading
from pathlib import Path

KINDS = ("RssAnon", "RssFile", "VmRSS")
MIB_PER_KIB = 1 / 1024


class PeakMemory:
    """A context manager that watches a process's memory. mib: the most it saw, by kind; {} where nothing is told."""

    def __init__(self, pid: int | str = "self", *, every: float = 0.01) -> None:
        """every: seconds between looks."""
        self.mib: dict[str, float] = {}
        self._status, self._every = Path(f"/proc/{pid}/status"), every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            for kind, mib in memory_mib(self._status).items():
                self.mib[kind] = max(self.mib.get(kind, 0.0), mib)


def memory_mib(status: Path = Path("/proc/self/status")) -> dict[str, float]:
    """MiB by kind; {} for a process that has ended, and on systems other than Linux."""
    try:
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii", errors="replace").splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {kind: int(lines[kind].split()[0]) * MIB_PER_KIB for kind in KINDS if kind in lines}

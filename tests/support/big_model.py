"""Use the 6B model at its real size, with random numbers, and measure what that takes. Linux only.

    python -m tests.support.big_model write FOLDER [--int8]    files of the real sizes (big_files.py), 20.5 or 11.5 GB
    python -m tests.support.big_model run [--out FILE --row NAME] -- generate "a tree" --preset z_image --ckpts FOLDER

`run` starts wgp.py with what follows, looks at its memory fifty times a second, and prints one JSON object: CPU seconds
and the peaks in MiB, of what is the process's own (RssAnon), of what lies in mapped files (RssFile), which is the page
cache's and goes when it is wanted elsewhere, and of both. --out adds the figures to a result file of wgp.py bench, as
the case C4. big_conversion.py measures the conversion of single layers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parents[2]
KINDS = ("RssAnon", "RssFile", "VmRSS")


class PeakMemory:
    """A context manager that watches a process's memory. mib: the most it saw, by kind."""

    def __init__(self, pid: int | str = "self", *, every: float = 0.01) -> None:
        self.mib = dict.fromkeys(KINDS, 0.0)
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
                self.mib[kind] = max(self.mib[kind], mib)


def memory_mib(status: Path = Path("/proc/self/status")) -> dict[str, float]:
    """MiB by kind; {} for a process that has ended."""
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {kind: int(lines[kind].split()[0]) / 1024 for kind in KINDS if kind in lines}


def run(arguments: list[str]) -> dict[str, Any]:
    """Run wgp.py with these arguments; what it took, and the JSON object that it ends with, if it was asked for one."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "wgp.py", *arguments]
    with (
        subprocess.Popen(command, cwd=PROGRAM, stdout=subprocess.PIPE, text=True) as process,
        PeakMemory(process.pid, every=0.02) as peak,
    ):
        output, _ = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"wgp.py ended with {process.returncode}")
    last = (output.strip().splitlines() or [""])[-1]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "command": "wgp.py " + " ".join(arguments),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "cpu_seconds": round(cpu, 1),
        "wall_seconds": round(time.monotonic() - began, 1),
        "own_peak_mib": round(peak.mib["RssAnon"]),
        "mapped_peak_mib": round(peak.mib["RssFile"]),
        "rss_peak_mib": round(peak.mib["VmRSS"]),
        "result": json.loads(last) if last.startswith("{") else None,
    }


def keep(path: Path, row: str, found: dict[str, Any]) -> None:
    """Add a run to a result file of wgp.py bench, beside the other rows of its case C4."""
    from shared.bench import results
    from shared.bench.machine import commit, state, this_machine, versions

    machine = this_machine()
    earlier = results.read(path).cases.get("C4") if path.exists() else None
    rows = [r for r in (earlier.rows if earlier else ()) if r.row != row]
    seconds = {f"{stage}_seconds": took for stage, took in (found["result"] or {}).get("seconds", {}).items()}
    values = {name: value for name, value in found.items() if name != "result"} | seconds
    record = results.Record(
        case="C4",
        date=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        commit=commit(PROGRAM),
        command="python -m tests.support.big_model run",
        how="one run of the program in a process of its own, random weights of the real size",
        versions=versions(),
        after=state(),
        rows=[*rows, results.Row(row, "ours", values)],
    )
    results.merge(path, machine, [record])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="do", required=True)
    write = commands.add_parser("write")
    write.add_argument("folder", type=Path)
    write.add_argument("--int8", action="store_true", help="the int8 files in place of those in bf16")
    running = commands.add_parser("run")
    running.add_argument("--out", type=Path, help="a result file of wgp.py bench to add the figures to")
    running.add_argument("--row", default="256x256, 2 forwards", help="what to call them there")
    running.add_argument("arguments", nargs="+", help="wgp.py's, after --")
    args = parser.parse_args()
    if args.do == "write":
        from tests.support.big_files import write_model

        write_model(args.folder, "int8" if args.int8 else "bf16")
        return
    found = run(args.arguments)
    print(json.dumps(found))  # noqa: T201 - a program of its own
    if args.out:
        keep(args.out, args.row, found)


if __name__ == "__main__":
    main()

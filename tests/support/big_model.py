"""Use the 6B model at its real size, with random numbers, and measure what that takes. Linux only.

    python -m tests.support.big_model write FOLDER [--int8]    files of the real sizes (big_files.py), 20.5 or 11.5 GB
    python -m tests.support.big_model write FOLDER --kind fp4  SVDQuant files, int4 (rank 256) or fp4 (rank 128)
    python -m tests.support.big_model run -- quantize FOLDER/MODEL --format nvfp4

`run` starts wgp.py with what follows, looks at its memory fifty times a second, and prints one JSON object: CPU seconds
and the peaks in MiB, of what is the process's own (RssAnon), of what lies in mapped files (RssFile), which is the page
cache's and goes when it is wanted elsewhere, and of both. Drawing with these files is the case C4 of wgp.py bench;
big_conversion.py measures the conversion of single layers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shared.bench.process_memory import PeakMemory

PROGRAM = Path(__file__).parents[2]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="do", required=True)
    write = commands.add_parser("write")
    write.add_argument("folder", type=Path)
    write.add_argument("--int8", action="store_true", help="the int8 files in place of those in bf16")
    write.add_argument("--kind", choices=["bf16", "int8", "int4", "fp4"], help="which files; bf16 if nothing is said")
    running = commands.add_parser("run")
    running.add_argument("arguments", nargs="+", help="wgp.py's, after --")
    args = parser.parse_args()
    if args.do == "write":
        from tests.support.big_files import write_model

        write_model(args.folder, args.kind or ("int8" if args.int8 else "bf16"))
        return
    print(json.dumps(run(args.arguments)))  # noqa: T201 - a program of its own


if __name__ == "__main__":
    main()

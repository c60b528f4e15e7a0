"""Throw broken files at every reader: each must end in a UserError or in a whole object, soon, and in bounded memory.

    python -m tests.fuzz --count 50000 --reader layers      (without --reader: all of them)

A file is a good one, changed by a few of the mutations below: bytes anywhere, the JSON of headers and markers, types,
shapes and names of tensors with offsets that stay consistent (so that deeper code is reached). What a run finds is
printed with the traceback and kept in --keep; finds become tests in tests/shared/quant/test_fuzz.py. A reader that
takes the interpreter down leaves the file that did it in --keep as `last-READER`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.fuzz.readers import readers
from tests.fuzz.runs import run

MEMORY_BYTES = 2**30  # a reader may map more than the process has at the start


def _limit_memory() -> None:
    """Let allocations beyond the limit fail as MemoryError instead of swapping (Linux; elsewhere without effect)."""
    if sys.platform != "linux":
        return
    import resource

    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))


def main(arguments: Iterable[str] | None = None) -> int:
    """Command line; exit code 1 when something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", action="append", help="repeatable; all without it")
    parser.add_argument("--count", type=int, default=50_000, help="files for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-finds")
    args = parser.parse_args(None if arguments is None else list(arguments))
    args.keep.mkdir(parents=True, exist_ok=True)
    known = readers(args.keep)
    found_any = False
    for name in args.reader or known:
        reader = known[name]()
        began, used = time.monotonic(), time.process_time()
        folder = args.keep / f"last-{name}"
        folder.mkdir(exist_ok=True)
        _limit_memory()
        outcomes, finds = run(reader, args.count, args.seed, folder)
        seconds, cpu = time.monotonic() - began, time.process_time() - used
        lines = [f"{name}: {sum(outcomes.values()):,} files in {seconds:.0f} s ({cpu:.0f} s of CPU)"]
        lines += [f"  {times:>7,}  {outcome}" for outcome, times in outcomes.most_common()]
        for number, find in enumerate(finds):
            path = args.keep / f"{name}-{number}{reader.suffix}"
            path.write_bytes(find.data)
            lines += [f"  {path}", find.words]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        found_any |= bool(finds)
    return int(found_any)


if __name__ == "__main__":
    sys.exit(main())

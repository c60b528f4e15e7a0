"""Z-Image on the command line and as a web page: `python wgp.py --help`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent
DONE, FAILED, USER_MISTAKE, INTERRUPTED = 0, 1, 2, 130
SECOND_PRESS_SECONDS = 1.0
LOG_LEVELS = {0: logging.ERROR, 1: logging.WARNING, 2: logging.INFO}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand or the page; return the exit code. What goes wrong becomes a message, and with --verbose 2 a
    traceback too.
    """
    interrupts: list[float] = []

    def interrupted(signum: int, frame: FrameType | None) -> None:
        interrupts.append(time.monotonic())
        # Ctrl-C is often pressed twice; the second must not cut the report of what was kept.
        if len(interrupts) < 2 or interrupts[-1] - interrupts[-2] > SECOND_PRESS_SECONDS:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)
    args = argparse.Namespace(verbose=1)
    try:
        args = parse(argv)
        return run(args)
    # SystemExit is argparse's. The rest is everything, on purpose: nobody above could show it better, and an
    # interrupt in the middle of an import can come out as any error.
    except Exception as error:  # noqa: BLE001
        return INTERRUPTED if interrupts else explain(error, args.verbose)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's flags; `families` among them, because each family adds its own."""
    from shared.app.context import DEFAULT_LORA_ROOT
    from shared.app.families import load_families
    from shared.cli.parser import build_parser, parse_arguments

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a sign shows "?" instead of failing
    families = load_families(ROOT / "models")
    args = parse_arguments(build_parser(families, DEFAULT_LORA_ROOT), argv)
    args.families = families
    return args


def run(args: argparse.Namespace) -> int:
    """Do what the flags ask for."""
    logging.basicConfig(level=LOG_LEVELS[args.verbose], format="%(message)s")
    if args.verbose < 2:  # wherever it is installed it warns, at every start, of kernels that nothing here uses
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from shared.app.context import AppContext
    from shared.cli import commands

    if args.command == "inspect":
        from shared.cli.inspection_report import inspect

        return inspect(args, args.families)
    ctx = AppContext.create(args, ROOT, args.families)
    for problem in ctx.presets.problems if args.command != "doctor" else ():  # its report has them
        print(problem, file=sys.stderr)
    if args.command == "generate":
        return commands.generate(ctx, args)
    if args.command == "presets":
        return commands.presets(ctx, args)
    if args.command == "quantize":
        from shared.cli.quantize import quantize

        return quantize(ctx, args)
    if args.command == "compare":
        from shared.cli.compare import compare

        return compare(ctx, args)
    if args.command == "bench":
        from shared.cli.bench import bench

        return bench(ctx, args)
    if args.command == "doctor":
        return commands.doctor(ctx, args)
    print("Starting the page ...", file=sys.stderr)  # its imports take seconds
    from shared.ui.app import launch

    return launch(ctx, args)


def explain(error: Exception, verbose: int) -> int:
    """Say on stderr what went wrong; return the exit code."""
    from shared.quant.errors import RunError, UserError

    if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's last flush must not fail again
        return DONE
    if verbose >= 2:
        traceback.print_exception(error)
    if isinstance(error, UserError):
        print("\n".join(part for part in (error.message, error.hint) if part), file=sys.stderr)
        return FAILED if isinstance(error, RunError) else USER_MISTAKE
    what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    print(what if verbose >= 2 else f"{what}\n--verbose 2 shows where.", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())

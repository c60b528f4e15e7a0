"""The subcommand `bench`: progress on stderr, a card for people on stdout, one JSON object as the last line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.bench.results import Record

_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from shared.bench.cases import ON_REQUEST, PEERS

    peers = ", ".join(f"{key} {what}" for key, what in PEERS.items())
    parser.add_argument(
        "--cases", metavar="C*,B1", default="", help="what to measure, ids or patterns; without it the cases are listed"
    )
    parser.add_argument(
        "--peers",
        metavar="P1,P3|all|none",
        help=f"what to measure beside us: {peers} (default: all but {', '.join(sorted(ON_REQUEST))})",
    )
    parser.add_argument(
        "--preset", metavar="ID,ID", default="", help="models that B5, B6 and C4 draw with (default: the demo)"
    )
    parser.add_argument(
        "--caps",
        metavar="6,3.5",
        default="",
        help="caps on GPU memory for B5, GB of 10^9 bytes (default: ten, 1.5 to 24)",
    )
    parser.add_argument(
        "--repeats", metavar="N", type=int,
        help="timed turns of each row, programs run for B5, B6, C4 (default: 10, fewer of slow ones)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="FILE", help="result file to merge into (default: one for this machine, day, presets and caps)"
    )
    parser.add_argument(
        "--scratch", metavar="DIR", help="folder for large files while measuring (default: the system's)"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    parser.add_argument(
        "--write-gates", action="store_true", help="take the counters of this run as those that later runs must have"
    )
    parser.add_argument(
        "--render",
        action="store_true",
        help="write docs/benchmarks.md, its plots and the figures in other texts from all result files",
    )


def bench(ctx: AppContext, args: argparse.Namespace) -> int:
    """Measure, or render what was measured; returns the exit code: 1 when a case failed or a gated counter changed."""
    from shared.bench import cases
    from shared.quant.errors import UserError

    if args.render:
        return _render(ctx.root)
    if not args.cases:
        print(cases.table())
        return 0
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: at least one is needed.")
    chosen, peers = cases.select_cases(args.cases), cases.select_peers(args.peers)
    return _measure(ctx, args, chosen, peers)


def _measure(ctx: AppContext, args: argparse.Namespace, chosen: Sequence[Any], peers: frozenset[str]) -> int:
    from shared.app.context import DEFAULT_PRESET
    from shared.bench import gates, results
    from shared.bench.card import card
    from shared.bench.machine import this_machine
    from shared.bench.run import Options, find_work, run_cases

    tell = (lambda text: print(text, file=sys.stderr, flush=True)) if args.verbose else (lambda text: None)
    presets = [name.strip() for name in (args.preset or DEFAULT_PRESET).split(",")]
    flags = [word for folder in vars(args).get("ckpts") or () for word in ("--ckpts", str(Path(folder).absolute()))]
    work = find_work(ctx.families, ctx.root, presets, flags, _caps(args.caps))
    machine = this_machine()
    day, of = f"{datetime.now(UTC):%Y-%m-%d}", f"{args.preset} {args.caps}"
    path = Path(args.out) if args.out else results.default_path(machine, day, of)
    results.read_own(path, machine)  # another machine's is refused before minutes are spent

    def keep(record: Record) -> None:  # after each comparison, so that what follows cannot lose it
        results.merge(path, machine, [record])

    options = Options(
        peers=peers, command=_command(args), root=ctx.root, repeats=args.repeats,
        folder=Path(args.scratch) if args.scratch else None, keep=keep,
    )  # fmt: skip
    records: list[Record] = []
    for record in run_cases(chosen, work, options, tell):
        keep(record)
        records.append(record)
        if not args.json:
            print(card(record), flush=True)
    problems = gates.write(records) if args.write_gates else gates.problems(records)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(json.dumps(results.Results(machine, {r.case: r for r in records}).as_dict()), flush=True)
    return _FAILED if problems or not all(record.finished for record in records) else 0


def _caps(text: str) -> Sequence[float]:
    from shared.bench.programs import CAPS_GB
    from shared.quant.errors import UserError

    if not text:
        return CAPS_GB
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise UserError(f"--caps {text}: gigabytes are needed, such as 6,3.5,1.5.")
    return found


def _render(root: Path) -> int:
    from shared.bench.page import render
    from shared.bench.results import read_all

    for name, text in render(read_all(), root=root).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(name)
    return 0


def _command(args: argparse.Namespace) -> str:
    """What to type to measure the same again."""
    names = ("cases", "peers", "preset", "caps", "repeats")
    flags = {f"--{name}": getattr(args, name) for name in names}
    return "python wgp.py bench " + " ".join(f'{flag} "{value}"' for flag, value in flags.items() if value)

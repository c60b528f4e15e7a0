"""The subcommand `quantize`: progress on stderr, the quality report on stdout."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.quantize import QuantizeResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a transformer: .safetensors, .gguf, an index, or a folder of one")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--format", metavar="F", help="int8, fp8_scaled, mxfp8, nvfp4, svdq_int4, svdq_fp4, int8_comfy, "
                       "fp8, bf16, fp16; q8_0, q5_1, q5_0, q4_1, q4_0 for GGUF")  # fmt: skip
    which.add_argument("--recipe", metavar="NAME|FILE", help="a format for each layer: nvfp4_mixed, or a JSON file")
    parser.add_argument("--rank", metavar="R", type=int, help="of SVDQ's low-rank branch (default: 32)")
    parser.add_argument(
        "--keep",
        metavar="PATTERN",
        action="append",
        default=[],
        help=r"leave layers plain whose whole official name fits, such as layers\.0\..*; repeatable",
    )
    parser.add_argument("--output", metavar="OUT", required=True, help="the new file, .safetensors or .gguf")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument(
        "--like", metavar="ID", default="", help="preset whose settings the new one takes (default: the one using IN)"
    )
    parser.add_argument("--no-preset", action="store_true", help="do not write a preset into finetunes")
    parser.add_argument("--json", action="store_true", help="end stdout with one JSON object about what was done")


def quantize(ctx: AppContext, args: argparse.Namespace) -> int:
    """Convert a file; returns the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from shared.app.quantize import QuantizeRequest
    from shared.app.quantize import quantize as run

    request = QuantizeRequest(
        source=Path(args.source).expanduser(),
        output=Path(args.output).expanduser(),
        recipe=args.format or args.recipe,
        rank=args.rank,
        keep=args.keep,
        like=args.like,
        with_preset=not args.no_preset,
        overwrite=args.overwrite,
    )
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn(), TimeRemainingColumn())
    disabled = args.verbose == 0 or not console.is_terminal
    with (
        contextlib.redirect_stdout(sys.stderr),
        Progress(*columns, console=console, transient=True, disable=disabled) as progress,
    ):
        task = progress.add_task("Reading the header", total=None)

        def on_progress(done: int, total: int, module: str) -> None:
            progress.update(task, completed=done, total=total, description=module)

        result = run(ctx, request, on_progress)
    print(json.dumps(result.as_dict()) if args.json else report_text(result), flush=True)
    return 0


def report_text(result: QuantizeResult) -> str:
    """The report for people: what was written, and the ten least exact layers."""
    from shared.cli.progress import duration, file_size

    said = result.as_dict()
    layers = ", ".join(f"{count} {name}" for name, count in said["layers"].items())
    memory = f", peak {said['peak_rss_mb']:,} MiB of RAM" if said["peak_rss_mb"] else ""
    lines = [
        f"{result.output}",
        f"  {file_size(result.bytes)} in {duration(result.seconds)}{memory}",
        f"  matrices: {layers}",
    ]
    if result.quantized:
        worst = result.quantized[: len(said["worst"])]
        width = max(len(report.module) for report in worst)
        lines += [f"  mean relative error of the weights {said['mean_relative_error']:.4f}; the least exact:"]
        lines += [f"    {r.module:<{width}}  {r.format:<10} {r.relative_error:.4f}" for r in worst]
    lines += [f"  {note}" for note in result.notes]
    lines += [f"  every layer: {result.report}"]
    if result.preset:
        lines += [f"  draw with it: wgp.py generate PROMPT --preset {result.preset}"]
    return "\n".join(lines)

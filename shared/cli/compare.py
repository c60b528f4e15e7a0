"""The subcommand `compare`: what goes on is told on stderr, the table goes to stdout."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.settings import parse_lora
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.compare import Comparison, Row
    from shared.app.context import AppContext


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", metavar="ID", help="model whose transformer is the reference (default: the demo)")
    parser.add_argument(
        "--formats",
        metavar="A,B|all",
        help="formats to write the transformer in and draw with; all of them if neither this nor --files is given",
    )
    parser.add_argument(
        "--files", metavar="FILE", nargs="+", default=[], help="transformers to compare with it, as they are"
    )
    parser.add_argument("--prompts", metavar="FILE", help="a text file, one prompt a line (default: the scorer's)")
    parser.add_argument("--count", metavar="N", type=int, help="pictures for each format (default: 32)")
    parser.add_argument("--steps", metavar="N", type=int, help="transformer forwards per picture")
    parser.add_argument("--resolution", metavar="WxH", help="size in pixels, multiples of 16")
    parser.add_argument("--lora", metavar="FILE[:STRENGTH]", help="draw with this LoRA too: what does it change")
    parser.add_argument("--lora-count", metavar="N", type=int, default=0, help="of the pictures (default: all)")
    parser.add_argument(
        "--scorer",
        metavar="MODULE",
        default="",
        help="Python module that brings prompts and judges pictures, such as training.judge (default: the preset's)",
    )
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=1,
        help="models to draw with at a time, sharing the cores: sooner done, but the times are a busy machine's",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder for weights, pictures and report")
    parser.add_argument("--json", action="store_true", help="end stdout with one JSON object instead of the table")


def compare(ctx: AppContext, args: argparse.Namespace) -> int:
    """Compare formats; returns the exit code, 1 when a format that was named could not be compared."""
    from rich.console import Console
    from rich.status import Status

    from shared.app.compare import ALL, DEFAULT_COUNT, CompareRequest
    from shared.app.compare import compare as run
    from shared.app.context import DEFAULT_PRESET

    prompts = _prompts(Path(args.prompts).expanduser()) if args.prompts else []
    count = args.count if args.count is not None else (len(prompts) or DEFAULT_COUNT)
    if count < 1:
        raise UserError(f"--count {count}: at least one picture is needed.")
    if args.lora_count < 0 or (args.lora_count and not args.lora):
        raise UserError(f"--lora-count {args.lora_count}: a number of pictures that are drawn with --lora as well.")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least one model has to be drawn with.")
    formats = [name.strip() for name in (args.formats or ("" if args.files else ALL)).split(",") if name.strip()]
    asked = {"num_inference_steps": args.steps, "resolution": args.resolution}
    request = CompareRequest(
        preset=args.preset or DEFAULT_PRESET,
        output=Path(args.output).expanduser(),
        formats=formats,
        files=[Path(file).expanduser() for file in args.files],
        prompts=prompts,
        count=count,
        settings={key: value for key, value in asked.items() if value is not None},
        lora=parse_lora(args.lora) if args.lora else None,
        scorer=args.scorer,
        lora_count=args.lora_count,
        jobs=args.jobs,
    )
    console = Console(stderr=True, quiet=args.verbose == 0)
    status = Status("Starting", console=console)
    with contextlib.redirect_stdout(sys.stderr), status if console.is_terminal else contextlib.nullcontext():
        result = run(ctx, request, status.update)
    print(json.dumps(result.as_dict()) if args.json else table(result), flush=True)
    # Whoever asks for all formats asks for those that there are.
    return int(any(row.problem and row.name in formats for row in result.rows))


def table(result: Comparison) -> str:
    """The figures for people, the reference first."""
    from shared.cli.progress import file_size

    titles: list[str] = ["format", "size", "peak MiB", "s/picture", "PSNR dB", "SSIM", "latent error"]
    scored = any(row.adherence is not None for row in result.rows)
    titles += ["adherence"] if scored else []
    titles += ["LoRA r", "in latents"] if result.lora else []
    lines = [titles]
    for row in result.rows:
        if row.problem:
            continue
        memory = row.peak_vram_mb or row.peak_rss_mb
        cells = [
            row.name,
            file_size(row.bytes),
            f"{memory:,.0f}" if memory else "-",
            f"{row.seconds:.2f}",
            "equal" if math.isinf(row.psnr) else f"{row.psnr:.1f}",
            f"{row.ssim:.4f}",
            f"{row.latent_error:.4f}",
        ]
        cells += [_percent(row.adherence)] if scored else []
        cells += [_number(row.lora), _number(row.lora_latents)] if result.lora else []
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    text += [_problem(row) for row in result.rows if row.problem]
    if result.order:
        text += [
            "",
            *(f"{'holds ' if said.holds else 'BROKEN'}  {said.expected}: {said.words}" for said in result.order),
        ]
    text += [
        "",
        f"{len(result.prompts)} pictures each, {result.preset} on {result.device} in {result.dtype}; "
        f"memory of the {'GPU' if any(row.peak_vram_mb for row in result.rows) else 'drawing process'}",
        f"pictures: {result.sheet}",
        f"figures: {result.report}",
    ]
    return "\n".join(text)


def _problem(row: Row) -> str:
    return f"{row.name}: {row.problem}"


def _prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read ({error}).", "A UTF-8 text, one prompt a line.") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UserError(f"--prompts {path}: holds no prompt.", "One prompt a line; lines that begin with # are notes.")
    return prompts


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"

"""The subcommand `quantize`: progress on stderr, the quality report on stdout."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.quantize import QuantizeResult


_SHOWN_CHOICES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that `quantize` takes."""
    _add_formats(parser)
    _add_calibration(parser)
    _add_output(parser)


def _add_formats(parser: argparse.ArgumentParser) -> None:
    """The source, what becomes of its layers, and LoRAs on the way."""
    parser.add_argument("source", metavar="IN", help="a transformer: .safetensors, .gguf, an index, or a folder of one")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--format", metavar="F", help="int8, fp8_scaled, mxfp8, nvfp4, svdq_int4, svdq_fp4, int8_comfy, "
                       "int8_convrot, int8_tensor, fp8, fp8_e5m2, fp8_scaled_rows, fp8_scaled_blocks, fp8_scaled_e5m2, "
                       "fp8_legacy, mxfp8_e8m0, bf16, fp16, fp32; q8_0, q5_1, q5_0, q4_1, q4_0 for GGUF")  # fmt: skip
    which.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="a format for each layer: nvfp4_mixed, auto (by --target-size), or a JSON file",
    )
    parser.add_argument("--rank", metavar="R", type=int, help="of SVDQ's low-rank branch (default: 32)")
    parser.add_argument(
        "--keep",
        metavar="PATTERN",
        action="append",
        default=[],
        help=r"leave layers plain whose whole official name fits, such as layers\.0\..*; repeatable",
    )
    parser.add_argument(
        "--merge-lora",
        metavar="FILE[:STRENGTH]",
        action="append",
        default=[],
        help="add a LoRA to the weights before they are converted; strength 1 if left out; repeatable",
    )
    parser.add_argument(
        "--error-lora",
        metavar="R",
        type=int,
        default=0,
        help="write OUT's stem + _lora.safetensors too: a LoRA of this rank that gives back some of what packing took",
    )


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    """Drawings before the conversion, and formats chosen by a size."""
    parser.add_argument(
        "--calibrate",
        metavar="N",
        type=int,
        default=0,
        help="draw N pictures first and watch what layers are fed with: SVDQ formats, --error-lora and --recipe auto "
        "then aim at the outputs of layers, and the report tells their errors",
    )
    parser.add_argument("--prompts", metavar="FILE", help="prompts for --calibrate, one in a line (default: our own)")
    parser.add_argument(
        "--learned-rounding",
        action="store_true",
        help="round each column in view of what others missed; slow; for SVDQ formats, with --calibrate",
    )
    parser.add_argument(
        "--target-size",
        metavar="SIZE",
        type=_bytes,
        default=0,
        help="size of OUT for --recipe auto, such as 4.8GB or 12MB; the formats are chosen by what layers stand",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    """The new file, and the preset that is made for it."""
    parser.add_argument("--shard-size", metavar="SIZE", type=_bytes, default=0,
                        help="split OUT into files of at most this size, such as 5GB, with an index")  # fmt: skip
    parser.add_argument("--diffusers", action="store_true",
                        help="OUT is a folder for diffusers: config.json and its names; bf16, fp16, fp32")  # fmt: skip
    parser.add_argument("--text-encoder", metavar="FILE", help="put this text encoder into OUT, a ComfyUI checkpoint")
    parser.add_argument("--vae", metavar="FILE", help="put this VAE into OUT, a ComfyUI checkpoint")
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
        merge_loras=[_merged(text) for text in args.merge_lora],
        error_lora_rank=args.error_lora,
        calibrate=args.calibrate,
        prompts=_prompts(args.prompts),
        learned_rounding=args.learned_rounding,
        target_size=args.target_size,
        shard_size=args.shard_size,
        diffusers=args.diffusers,
        text_encoder=Path(args.text_encoder).expanduser() if args.text_encoder else None,
        vae=Path(args.vae).expanduser() if args.vae else None,
    )
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn(), TimeRemainingColumn())
    disabled = args.verbose == 0 or not console.is_terminal
    with (
        contextlib.redirect_stdout(sys.stderr),
        Progress(*columns, console=console, transient=True, disable=disabled) as progress,
    ):
        task = progress.add_task("Reading the header", total=None)
        lines = PlainLines()

        def on_progress(done: int, total: int, module: str) -> None:
            progress.update(task, completed=done, total=total, description=module)
            if args.verbose and not console.is_terminal:
                for line in lines.told(done, total, module):
                    print(line, file=sys.stderr, flush=True)

        result = run(ctx, request, on_progress)
    print(json.dumps(result.as_dict()) if args.json else report_text(result), flush=True)
    return 0


class PlainLines:
    """Progress where stderr is no terminal: a line for each stage, and one for each tenth with the time left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said = ""
        self._begun: tuple[float, float] | None = None  # share done and the time, when layers were first worked on
        self._tenths = 0

    def told(self, done: int, total: int, module: str) -> Iterator[str]:
        """What is to be said now. done, total: numbers of the model; module: the one that comes next, or a stage."""
        from shared.cli.progress import left_words

        if " " in module:  # no layer, but what precedes them: "Calibrating, picture 1 of 8"
            if module != self._said:
                yield module
            self._said = module
            return
        share, now = done / max(total, 1), self._clock()
        if self._begun is None:
            self._begun, self._tenths = (share, now), int(10 * share)
            if done:
                yield f"going on at {share:.0%}, where an earlier run ended"
        elif int(10 * share) > self._tenths:
            self._tenths = int(10 * share)
            before, since = self._begun
            yield f"{share:.0%}, {left_words((now - since) / (share - before) * (1 - share))}"


def _bytes(text: str) -> int:
    """4.8GB, 12 MB, 4.5GiB or a number of bytes."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; 4.8GB and 12MB are")
    return round(float(match[1]) * units[match[2].lower()])


def _prompts(file: str | None) -> list[str]:
    """The lines of a file. Raises UserError when there are none."""
    from shared.quant.errors import UserError

    if file is None:
        return []
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file}: cannot be read ({error}).", "Check the path.") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"--prompts {file}: the file is empty.", "Write one prompt in a line.")
    return found


def _merged(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH. Raises UserError for a strength that changes over the steps."""
    from shared.app.settings import parse_lora
    from shared.quant.errors import UserError

    choice = parse_lora(text)
    try:
        return Path(choice.file).expanduser(), float(choice.multiplier)
    except ValueError:
        raise UserError(f"--merge-lora {text}: the weights take one strength.", "Give one number.") from None


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
        seen = said["mean_output_error"]
        what, mean = ("weights", said["mean_relative_error"]) if seen is None else ("outputs", seen)
        errors = [r.relative_error if r.output_error is None else r.output_error for r in worst]
        lines += [f"  mean relative error of the {what} {mean:.4f}; the least exact:"]
        lines += [f"    {r.module:<{width}}  {r.format:<10} {e:.4f}" for r, e in zip(worst, errors, strict=True)]
    if result.error_lora is not None:
        outputs = said["mean_corrected_output_error"]
        mean = said["mean_corrected_error"] if outputs is None else outputs
        lines.append(f"  with {result.error_lora.name}: {mean:.4f}")
    if result.chosen:
        lines += _choice_text(result)
    lines += [f"  {note}" for note in result.notes]
    lines += [f"  every layer: {result.report}"]
    if result.preset:
        lines += [f"  draw with it: wgp.py generate PROMPT --preset {result.preset}"]
    return "\n".join(lines)


def _choice_text(result: QuantizeResult) -> list[str]:
    """Why layers got the formats they have, those first that small formats hurt most."""
    smallest = next(iter(result.chosen[0].errors))
    kept = sorted((c for c in result.chosen if c.format != smallest), key=lambda c: -c.errors[smallest])
    expected = result.expected_bytes or 0
    lines = [
        f"  size by arithmetic {expected:,} bytes, in fact {result.bytes:,}; {len(result.chosen) - len(kept)} of "
        f"{len(result.chosen)} layers are {smallest}, {len(kept)} got more bytes, where these buy most:"
    ]
    width = max((len(c.layer) for c in kept), default=0)
    lines += [
        f"    {c.layer:<{width}}  {c.format:<10} error {c.errors[smallest]:.4f} -> {c.errors[c.format]:.4f}, "
        f"excess kurtosis {c.kurtosis:.1f}, peak {c.peak:.1f} rms"
        for c in kept[:_SHOWN_CHOICES]
    ]
    return lines

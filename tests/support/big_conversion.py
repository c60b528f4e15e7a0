"""Measure what converting the 6B model takes: a sparse file of its size, of which some layers hold numbers.

    python -m tests.support.big_conversion --format svdq_int4 --only "layers\\.0\\.feed_forward\\.w13"

The file is 12.3 GB long but takes only the disk space of the layers named, which are the ones converted. Prints one
JSON object: peak MiB of memory that is the process's own (RssAnon), against that after all imports. Weights that are
mapped from the file are the page cache's and do not count. --turns: fewer turns of SVDQuant take less time and as much
memory. Linux only. To convert the whole model, see big_model.py.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from models.z_image import conversion
from shared.bench.process_memory import PeakMemory, memory_mib
from shared.quant import svdquant  # noqa: F401 - what is imported later would count
from shared.quant.checkpoint import Checkpoint
from shared.quant.convert import Conversion, Means, convert, plan_conversion
from shared.quant.formats import svdq
from shared.quant.inputs import SAMPLE_ROWS, Inputs
from shared.quant.packings.svdq import Kind
from shared.quant.recipe import Recipe
from shared.quant.targets import Quantize, targets
from tests.support.big_files import Numbers, transformer_shapes, write_safetensors


def write_sparse(path: Path, filled: re.Pattern[str]) -> None:
    """The 6B model in official names and bfloat16; numbers only in the modules that fit `filled`, else zeros."""
    shapes = transformer_shapes()
    write_safetensors(path, {name: ("BF16", shape) for name, shape in shapes.items()}, None)
    tensors, numbers = Checkpoint.open(path).tensors, Numbers()
    with path.open("r+b") as file:
        for name, shape in shapes.items():
            if filled.fullmatch(re.sub(r"feed_forward\.w[13]\b", "feed_forward.w13", name).removesuffix(".weight")):
                file.seek(tensors[name].offset)
                file.writelines(numbers.bf16(name, shape))


def made_up(planned: Conversion, module: str) -> Inputs:
    columns = next(job.shapes["weight"][1] for job in planned.jobs if job.source == module)
    rows = torch.randn(SAMPLE_ROWS, columns)
    return Inputs(rows.square().mean(dim=0).sqrt(), rows.abs().amax(dim=0), rows)


def in_turns(kind: Kind, turns: int) -> Quantize:
    def quantize(
        weight: torch.Tensor, parts: int, rank: int, *, inputs: Inputs | None = None, learned_rounding: bool = False
    ) -> dict[str, torch.Tensor]:
        return svdq.quantize(
            weight,
            kind=kind,
            rank=rank,
            parts=parts,
            iterations=turns,
            inputs=inputs,
            learned_rounding=learned_rounding,
        )

    return quantize


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--format", default="svdq_int4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--error-lora", type=int, default=0)
    parser.add_argument("--learned-rounding", action="store_true", help="with 512 made-up rows of inputs of each layer")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", default=r"layers\.0\.feed_forward\.w13", help="our modules to convert")
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    only = re.compile(args.only)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "sparse.safetensors"
        write_sparse(source, only)
        before = memory_mib()["RssAnon"]
        began = time.monotonic()
        with PeakMemory() as peak:
            known = dict(targets())
            for name, kind in (("svdq_int4", "int4"), ("svdq_fp4", "fp4")):
                known[name] = replace(known[name], quantize=in_turns(kind, args.turns))
            recipe = Recipe.load(conversion.RECIPES / f"{args.format}.json", [*known, "bf16", "fp16"])
            planned = plan_conversion(conversion.open_model(source), recipe, known)
            planned = replace(planned, jobs=tuple(job for job in planned.jobs if only.fullmatch(job.source)))
            reports = convert(
                planned,
                Path(folder) / "out.safetensors",
                rank=args.rank,
                metadata={},
                identity=None,
                on_progress=lambda done, total, module: None,
                means=Means(
                    rank=args.rank,
                    error_lora_rank=args.error_lora,
                    learned_rounding=args.learned_rounding,
                    inputs=lambda module: made_up(planned, module) if args.learned_rounding else None,
                ),
            )
        found = {
            "source_bytes": source.stat().st_size,
            "layers": {r.module: [list(r.shape), r.format, round(r.relative_error, 4)] for r in reports},
            "own_mib_before": round(before),
            "own_mib_peak": round(peak.mib["RssAnon"]),
            "seconds": round(time.monotonic() - began),
        }
    print(json.dumps(found))  # noqa: T201 - a program of its own


if __name__ == "__main__":
    main()

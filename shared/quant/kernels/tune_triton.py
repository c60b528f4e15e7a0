"""Measure the tiles of the 8-bit products on this machine's GPU, and write a tuning.json with the fastest.

    python -m shared.quant.kernels.tune_triton --out shared/ops/tuning.json

For the card's generation every entry of the products is raced at its own number of tokens over the published network's
five shapes; what is known of other generations stays. Takes minutes, most of them in Triton's compiler.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from shared.ops import tuning
from shared.ops.rounding import Kind
from shared.ops.tuning import Launch

KINDS: tuple[Kind, ...] = ("int8", "fp8")
MOST_TOKENS = 4224  # of the entry without a bound: a 1024x1024 picture with its caption
SHAPES = ((11520, 3840), (3840, 3840), (20480, 3840), (3840, 10240))  # outputs, inputs of a block's linears
TIMES, WARM_UP = 7, 3

# Seconds of one product kind with so many tokens under these options; RuntimeError where they do not run.
Measure = Callable[[Kind, int, Launch], float]


def candidates() -> list[Launch]:
    """The options worth a race: tiles that fill a card's matrix units, and enough stages to hide its memory."""
    sizes = product((16, 64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (3, 4))
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    found = (dict(zip(names, values, strict=True)) for values in sizes)
    # A warp makes between 512 and 8192 results: less leaves it idle, more does not fit its registers.
    return [
        {**options, "GROUP_M": 8}
        for options in found
        if 512 <= options["BLOCK_M"] * options["BLOCK_N"] // options["num_warps"] <= 8192
    ]


def tuned(document: Mapping[str, Any], capability: int, origin: str, measure: Measure) -> dict[str, Any]:
    """The document of tuning.json with this generation's products measured; the others' entries as they are.

    capability: of the card; a generation that is not listed yet starts from the one before it. origin: what was
    measured with, in words. A kind of product that no option can run is left as it is.
    """
    architectures = dict(document["architectures"])
    known = sorted(int(name) for name in architectures)
    nearest = max((arch for arch in known if arch <= capability), default=known[0])
    kernels = dict(architectures[str(nearest)])
    for kind in KINDS:
        entries: Sequence[Sequence[Any]] = kernels.get(f"{kind} matmul", ())
        best = []
        for bound, options in entries:
            tokens = MOST_TOKENS if bound is None else bound
            with suppress(RuntimeError):  # no such units on this card
                options, _ = tuning.fastest([dict(options), *candidates()], partial(measure, kind, tokens))
            best.append([bound, options])
        if best:
            kernels[f"{kind} matmul"] = best
    architectures[str(capability)] = kernels
    measured = {**document.get("measured", {}), str(capability): origin}
    return {**document, "measured": measured, "architectures": architectures}


def measure_on(device: Any) -> Measure:
    """Measures on a GPU: the least of several, summed over the shapes."""
    import torch

    from shared.ops import triton_ready
    from shared.ops.rounding import round_rows
    from shared.quant.kernels.triton_matmul import scaled_matmul

    def measure(kind: Kind, tokens: int, options: Launch) -> float:
        total = 0.0
        for rows, columns in SHAPES:
            a = round_rows(torch.randn(tokens, columns, device=device, dtype=torch.bfloat16), kind)
            b = round_rows(torch.randn(rows, columns, device=device), kind)
            least = float("inf")
            for turn in range(WARM_UP + TIMES):
                torch.cuda.synchronize(device)
                began = time.perf_counter()
                with triton_ready.launching():
                    scaled_matmul(a, b.codes, b.scale, launch=options)
                torch.cuda.synchronize(device)
                if turn >= WARM_UP:
                    least = min(least, time.perf_counter() - began)
            total += least
        return total

    return measure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 1 where no kernel can run, which is said."""
    import torch

    from shared.ops import triton_ready

    parser = argparse.ArgumentParser(description="Measure the tiles of the 8-bit products on this machine's GPU.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the tuning.json")
    out: Path = parser.parse_args(arguments).out
    device = torch.device("cuda")
    if (reason := triton_ready.why_not(device) if torch.cuda.is_available() else "there is no NVIDIA GPU") is not None:
        sys.stderr.write(f"Nothing measured: {reason}.\n")
        return 1
    origin = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    document = json.loads(tuning.FILE.read_text(encoding="utf-8"))
    result = tuned(document, triton_ready.capability(device), origin, measure_on(device))
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

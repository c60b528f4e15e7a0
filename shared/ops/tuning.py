"""How each Triton kernel is launched on each generation of GPU: read from tuning.json, so that nothing is searched.

    {"80": {"row": [[1024, {"num_warps": 4}], [null, {"num_warps": 16}]], ...}, ...}

For each architecture (compute capability without the dot) and kernel a list by size, the first whose bound is not
exceeded counts; null has no bound. The size is a row's width for kernels of rows, the number of tokens for products. An
architecture that is not listed takes the newest listed one before it.

The figures were set by reasoning (docs/kernels.md), none is measured yet. Where a GPU is at hand, the products' are
measured and written by: python -m shared.quant.kernels.tune_triton --out shared/ops/tuning.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tuning.json")

Launch = dict[str, int]
Table = Mapping[str, Mapping[str, Sequence[Sequence[Any]]]]


def launch(kernel: str, capability: int, size: int, table: Table | None = None) -> Launch:
    """The launch options of `kernel` for a size on a GPU of this compute capability, a fresh dict.

    capability: major * 10 + minor; below the oldest listed one, as on the interpreter, the oldest is taken.
    """
    kernels = _architecture(capability, read() if table is None else table)
    for bound, options in kernels[kernel]:
        if bound is None or size <= bound:
            return dict(options)
    raise KeyError(f"tuning.json has no entry of {kernel} without a bound for capability {capability}")


@cache
def read(file: Path = FILE) -> Table:
    """The table of a file."""
    table: Table = json.loads(file.read_text(encoding="utf-8"))["architectures"]
    return table


def fastest(candidates: Sequence[Launch], seconds: Callable[[Launch], float]) -> tuple[Launch, float]:
    """Of candidate options the one with the least seconds. seconds: raises RuntimeError for one that cannot run."""
    best: tuple[Launch, float] | None = None
    for options in candidates:
        try:
            took = seconds(options)
        except RuntimeError:  # out of shared memory or registers on this card: not for it
            continue
        if best is None or took < best[1]:
            best = options, took
    if best is None:
        raise RuntimeError(f"none of {len(candidates)} launch options runs on this device")
    return best


def _architecture(capability: int, table: Table) -> Mapping[str, Sequence[Sequence[Any]]]:
    known = sorted(int(name) for name in table)
    return table[str(max((arch for arch in known if arch <= capability), default=known[0]))]

"""bitsandbytes' 4-bit numbers: two codes a byte, a table of 16 values, a largest magnitude for each block.

    W[n, k] = table[code[n, k]] * absmax[n, k // block]

The first of a byte's two numbers is its high half. With the nf4 table (..., 14: 0.72296, 15: 1.0), the byte 0xEF and an
absmax of 0.5 the numbers are 0.36148 and 0.5. nf4's values are quantiles of the normal distribution; fp4's are those of
a float of 1 sign, 2 exponent and 1 mantissa bits, over 12. Both come out of the file, so one packing serves both.
Source: bitsandbytes 0.50.2, functional.py, get_4bit_type() and dequantize_4bit().
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TableBlocks:
    """Tensors: codes uint8 (rows, columns / 2), absmax float32 (rows, columns / block), table float32 (16,)."""

    kind: str  # "nf4" or "fp4"

    @property
    def name(self) -> str:
        return self.kind

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes, absmax = tensors["codes"], tensors["absmax"]
        rows, blocks = absmax.shape
        # One look-up for both numbers of a byte.
        pairs = torch.cartesian_prod(tensors["table"], tensors["table"])
        values = pairs.index_select(0, codes.flatten().int()).view(rows, blocks, -1)
        return (values * absmax.unsqueeze(2)).view(rows, -1).to(dtype)

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        return {
            "codes": tensors["codes"][start:stop],
            "absmax": tensors["absmax"][start:stop],
            "table": tensors["table"],
        }

    def join_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        first = parts[0]
        if any(p["absmax"].shape[1] != first["absmax"].shape[1] for p in parts):
            return None
        if not all(torch.equal(p["table"], first["table"]) for p in parts):
            return None
        joined = {name: torch.cat([p[name] for p in parts]) for name in ("codes", "absmax")}
        return {**joined, "table": first["table"]}

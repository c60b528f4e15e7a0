"""bitsandbytes' 4-bit numbers: two codes a byte, a table of 16 values, a largest magnitude for each block.

    W[n, k] = table[code[n, k]] * magnitude[n, k // block]

The first of a byte's two numbers is its high half. With the nf4 table (..., 14: 0.72296, 15: 1.0), the byte 0xEF and a
magnitude of 0.5 the numbers are 0.36148 and 0.5. nf4's values are quantiles of the normal distribution; fp4's are those
of a float of 1 sign, 2 exponent and 1 mantissa bits, over 12. Both come out of the file, so one packing serves both.

Magnitudes may be packed themselves ("nested"): a byte each, blocks of them having a scale and an offset,

    magnitude[b] = nested_table[absmax[b]] * nested_absmax[b // nested_block] + nested_offset[b // nested_block]

with b counted through the matrix from row to row. They are worked out each time the matrix is unpacked, which takes
1 ms for 10240 x 3840, and stay packed in between: 0.4 bits a number less, and nothing to read when a file is opened.
Source: bitsandbytes 0.50.2, functional.py, get_4bit_type() and dequantize_4bit().
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.quant.pieces import Stackable

_TABLES = ("table", "nested_table")


@dataclass(frozen=True)
class TableBlocks(Stackable):
    """Tensors: codes uint8 (rows, columns / 2), absmax (rows, columns / block), table float32 (16,).

    absmax: float32 magnitudes; or, where there are also nested_table float32 (256,), nested_absmax and nested_offset
    float32 (magnitudes / nested_block,), uint8 codes of them. nested_block: 0 where none are nested.
    """

    kind: str  # "nf4" or "fp4"
    nested_block: int = 0

    @property
    def name(self) -> str:
        return self.kind

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes, absmax = tensors["codes"], self.magnitudes(tensors)
        rows, blocks = absmax.shape
        # One look-up for both numbers of a byte.
        pairs = torch.cartesian_prod(tensors["table"], tensors["table"])
        values = pairs.index_select(0, codes.flatten().int()).view(rows, blocks, -1)
        return (values * absmax.unsqueeze(2)).view(rows, -1).to(dtype)

    def magnitudes(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Every block's, float32 (rows, columns / block)."""
        absmax = tensors["absmax"]
        if "nested_absmax" not in tensors:
            return absmax
        nested = tensors["nested_table"].index_select(0, absmax.flatten().int())
        whole = len(nested) // self.nested_block * self.nested_block
        for start, stop in ((0, whole), (whole, len(nested))):  # the last of them may be short
            blocks = slice(start // self.nested_block, -(-stop // self.nested_block))
            scale, offset = (tensors[name][blocks].unsqueeze(1) for name in ("nested_absmax", "nested_offset"))
            if len(scale):
                nested[start:stop].view(len(scale), -1).mul_(scale).add_(offset)
        return nested.view(absmax.shape)

    def unnested(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with magnitudes that are no longer packed."""
        return {"codes": tensors["codes"], "absmax": self.magnitudes(tensors), "table": tensors["table"]}

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Nested magnitudes are cut where a block of them ends, or the matrix does, and are unpacked to be cut else."""
        rows, blocks = tensors["absmax"].shape
        cut = {name: tensors[name][start:stop] for name in ("codes", "absmax")} | {"table": tensors["table"]}
        if "nested_absmax" not in tensors:
            return cut
        if start * blocks % self.nested_block or (stop * blocks % self.nested_block and stop != rows):
            return self.take_rows(self.unnested(tensors), start, stop)
        first, last = start * blocks // self.nested_block, -(-stop * blocks // self.nested_block)
        cut |= {name: tensors[name][first:last] for name in ("nested_absmax", "nested_offset")}
        return cut | {"nested_table": tensors["nested_table"]}

    def stack_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]] | None:
        """As Stackable's. None also where a part ends within a block of nested magnitudes, or some are not nested."""
        first = parts[0]
        if any(p.keys() != first.keys() or p["absmax"].shape[1] != first["absmax"].shape[1] for p in parts):
            return None
        if "nested_absmax" in first and any(p["absmax"].numel() % self.nested_block for p in parts[:-1]):
            return None
        tables = [name for name in _TABLES if name in first]
        if not all(torch.equal(p[name], first[name]) for p in parts for name in tables):
            return None
        return {name: [first[name]] if name in tables else [p[name] for p in parts] for name in first}

    def join_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        joined = super().join_rows(parts)
        if joined is None and any("nested_absmax" in part for part in parts):
            return super().join_rows([self.unnested(part) for part in parts])
        return joined

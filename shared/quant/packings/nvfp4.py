"""NVFP4: E2M1 codes, a scale in E4M3 for every 16 columns of a row, and one in float32 above them: 4.5 bits a number.

    number(r, c) = value(code(r, c)) * block_scale(r, c // 16) * tensor_scale

Worked once, for a weight whose largest number is 0.268800: tensor_scale = 0.2688 / (448 * 6) = 0.0001, chosen so that
the largest block scale is 448, the largest E4M3. A block whose largest number is 0.03 wants the block scale
0.03 / 6 / 0.0001 = 50, which E4M3 holds as 48 or 52 (50 is halfway and goes to the even one, 48). In this block the
codes stand for multiples of 48 * 0.0001 = 0.0048, and 0.03 is code 7, 6 * 0.0048 = 0.0288: 4 % off. The relative error
of a whole matrix of normally distributed numbers is about 9 %.

The tensor scale is kept once per row: parts with different ones can then be joined, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.quant.packings.block_scaled import BlockScaled

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 16


@dataclass(frozen=True)
class Nvfp4(BlockScaled):
    """codes: uint8 (rows, columns / 2), the even column in the high half of a byte. block_scales: uint8 (rows,
    columns / 16), E4M3 as bytes (see fp8.py). tensor_scale: float32 (rows, 1).

    columns: of the matrix, where its last block is padded; None when the blocks end where the matrix does. swizzled:
    whether the block scales are in the order of swizzle.py, padded, as files have them and tensor cores read them.
    low_first: whether the even column is in the low half of a byte instead. The tensor scale may be (1, 1).
    """

    columns: int | None = None
    swizzled: bool = False
    low_first: bool = False
    name = "nvfp4"
    scales = "block_scales"
    block_bytes = BLOCK // 2

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        import torch

        from shared.quant import e2m1
        from shared.quant.packings import fp8

        tensors = self.natural(tensors)
        scales = tensors["tensor_scale"] * fp8.decode(tensors["block_scales"], "e4m3fn", torch.float32)
        numbers = e2m1.unpack_values(tensors["codes"], low_first=self.low_first)
        numbers.unflatten(1, (-1, BLOCK)).mul_(scales.unsqueeze(-1))
        return numbers[:, : self.columns].to(dtype)

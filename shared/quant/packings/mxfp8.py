"""MXFP8: numbers in E4M3 with one power of two for every 32 columns of a row: 8.25 bits a number.

    number(r, c) = value(r, c) * 2 ** (exponent(r, c // 32) - 127)

Worked once, for a block whose largest number is 0.03: 0.03 / 448 = 2 ** -13.87, rounded up 2 ** -13, so the exponent's
byte is 127 - 13 = 114, and 0.03 becomes 0.03 * 2 ** 13 = 245.76, in E4M3 240, which stands for 0.0293: 2 % off. The
relative error of a whole matrix of normally distributed numbers is about 2.7 %.

Byte 0 means 2 ** -127 to the standard (OCP Microscaling Formats 1.0, section 5.4) and zero to comfy-kitchen, which
writes it for blocks of zeros. Read as comfy-kitchen does; for such a block both come to the same. Byte 255 is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.quant.packings.block_scaled import BlockScaled

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 32
BIAS = 127
NAN = 255
_MANTISSA_BITS = 23  # of float32, whose exponents have the same bias


@dataclass(frozen=True)
class Mxfp8(BlockScaled):
    """codes: uint8 (rows, columns), E4M3 as bytes (see fp8.py). exponents: uint8 (rows, columns / 32).

    columns: of the matrix, where its last block is padded; None when the blocks end where the matrix does. swizzled:
    whether the exponents are in the order of swizzle.py, padded, as files have them and tensor cores read them.
    """

    columns: int | None = None
    swizzled: bool = False
    name = "mxfp8"
    scales = "exponents"
    block_bytes = BLOCK

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        import torch

        from shared.quant.packings import fp8

        scales = powers(self.natural(tensors)["exponents"])
        numbers = fp8.decode(tensors["codes"], "e4m3fn", torch.float32)
        numbers.unflatten(1, (-1, BLOCK)).mul_(scales.unsqueeze(-1))
        return numbers[:, : self.columns].to(dtype)


def powers(exponents: Tensor) -> Tensor:
    """float32 2 ** (exponent - 127) of uint8 exponents: the byte is a float32's own exponent; 0 gives 0."""
    import torch

    return (exponents.int() << _MANTISSA_BITS).view(torch.float32)

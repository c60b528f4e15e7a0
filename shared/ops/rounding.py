"""Activations in 8 bits: what a kernel for packed weights multiplies, and the operation that makes it.

Each token is divided by a scale of its own and rounded, so that its largest number takes the largest code:

    int8   scale = max|x| / 127     code = round(x / scale), halves to even
    fp8    scale = max|x| / 448     code = e4m3(x / scale)

A token with the largest number 2.54 gets the int8 scale 0.02: 0.31 becomes code 16 (15.5, to the even one), read back
as 0.32. On normally distributed activations int8 adds a relative error of 0.8 %, E4M3 2.6 %.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["int8", "fp8"]

LARGEST: dict[Kind, float] = {"int8": 127.0, "fp8": 448.0}
CODES: dict[Kind, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Rounded(NamedTuple):
    """Tokens in 8 bits: codes (..., K) int8 or float8_e4m3fn, scale (T, 1) float32 for the T tokens in order.

    dtype: what they were rounded from, and what a product with them is to be.
    """

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def kind(self) -> Kind:
        return "int8" if self.codes.dtype == torch.int8 else "fp8"

    def restore(self) -> Tensor:
        """The numbers that the codes stand for: (..., K) in `dtype`."""
        flat = self.codes.reshape(len(self.scale), -1).float() * self.scale
        return flat.view(self.codes.shape).to(self.dtype)


class Sums(NamedTuple):
    """A product of int8 codes before its scales: numbers[t, n] = sums[t, n] * row[t] * column[n].

    sums: (T, N) int32. row: (T, 1), column: (N, 1), float32. shape: (..., N), dtype: what the product is to be.
    """

    sums: Tensor
    row: Tensor
    column: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def restore(self) -> Tensor:
        """The numbers (..., N) in `dtype`."""
        return (self.sums * self.row * self.column.t()).to(self.dtype).view(self.shape)


def round_rows(x: Tensor, kind: Kind) -> Rounded:
    """Round the tokens of x (..., K), any float type, in plain torch. A token of zeros gets zeros."""
    numbers = x.reshape(-1, x.shape[-1]).float()
    scale = numbers.abs().amax(dim=1, keepdim=True).div_(LARGEST[kind])
    scale.clamp_(min=torch.finfo(torch.float32).tiny)
    numbers = numbers / scale  # out of place: float() of float32 is x itself
    codes = numbers.round_().to(torch.int8) if kind == "int8" else numbers.to(torch.float8_e4m3fn)
    return Rounded(codes.view(x.shape), scale, x.dtype)

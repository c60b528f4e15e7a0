"""8-bit floats, with or without scales: W[n, k] = value(codes[n, k]) * scale[n, k // group].

    e4m3fn   s eeee mmm   largest 448,   2^(e-7)  * (1 + m/8), below 2^-6  steps of 2^-9;  0x7f is NaN, no infinity
    e5m2     s eeeee mm   largest 57344, 2^(e-15) * (1 + m/4), below 2^-14 steps of 2^-16; has infinity and NaN

e4m3fn has three digits behind the leading one, so a weight is wrong by at most 1/16 of itself: 0.30 = 2^-2 * 1.2
becomes 2^-2 * (1 + 2/8) = 0.3125. Weights of a network are small, near the coarse steps below 2^-6; a scale of
max|W| / 448 lifts them to where the steps are relative. A bare cast has no scale and pays for that.

One scale for the whole matrix stays one number (1, 1), which is what hardware products want; it is repeated by rows
only when matrices with different ones are joined.

Codes are kept as bytes: torch cannot put its float8 types on an Apple GPU at all, and takes them for floating point
that a model's .to(bfloat16) may convert. Where a product wants float8, `codes.view(DTYPES[kind])` is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.quant.packing import Packed
from shared.quant.packings import scale_rows
from shared.quant.pieces import Stackable

DTYPES = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Float8(Stackable):
    """Tensors: `codes` (rows, columns) uint8, and `scale` (1 or rows, groups) float32 unless it is 1 everywhere.

    Of several groups the scale may have fewer rows, each for some of the matrix's (scale_rows.py). kind: "e4m3fn" or
    "e5m2".
    """

    kind: str

    @property
    def name(self) -> str:
        return "fp8"

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes, scale = tensors["codes"], tensors.get("scale")
        if scale is None:
            return decode(codes, self.kind, dtype)
        values = decode(codes, self.kind, torch.float32)
        scale = scale_rows.spread(scale, len(codes))
        weight: Tensor = values.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)
        return weight.flatten(1).to(dtype)

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        codes, scale = tensors["codes"], tensors.get("scale")
        cut = {"codes": codes[start:stop]}
        return cut if scale is None else cut | {"scale": scale_rows.cut(scale, len(codes), start, stop)}

    def stack_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]] | None:
        scales = [p["scale"] if "scale" in p else torch.ones(1, 1, device=p["codes"].device) for p in parts]
        if len({s.shape[1] for s in scales}) > 1:
            return None
        codes = [p["codes"] for p in parts]
        if all(s.shape == (1, 1) and torch.equal(s, scales[0]) for s in scales):
            return {"codes": codes, "scale": scales[:1]} if "scale" in parts[0] else {"codes": codes}
        return {"codes": codes, "scale": scale_rows.stacked(scales, [len(c) for c in codes])}


def pack(codes: Tensor, scale: Tensor | None) -> Packed:
    """codes: (rows, columns) float8. scale: as Float8's, of any float type, groups dividing columns; None for 1."""
    kind = next(k for k, dtype in DTYPES.items() if dtype == codes.dtype)
    tensors = {"codes": codes.view(torch.uint8)}
    if scale is not None:
        tensors["scale"] = scale.float()
    return Packed(Float8(kind), (codes.shape[0], codes.shape[1]), tensors)


def decode(codes: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """What these bytes stand for, exactly: 16 bits hold every float8. New memory."""
    if codes.device.type == "cuda":
        return codes.view(DTYPES[kind]).to(dtype)
    # By a table of 256 numbers: Apple GPUs know no float8, and CPUs cast it five times as slowly as they look it up.
    numbers = torch.arange(256, dtype=torch.uint8).view(DTYPES[kind]).to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    found = numbers.view(bits).to(codes.device).index_select(0, codes.flatten().int())
    return found.view(dtype).view(codes.shape)


def cast(weight: Tensor, kind: str) -> Tensor:
    """Round to the nearest float8 of this kind, larger numbers to the largest: torch alone would make them NaN."""
    limit = torch.finfo(DTYPES[kind]).max
    return weight.float().clamp(-limit, limit).to(DTYPES[kind])


def scale_for(weight: Tensor, kind: str, dim: tuple[int, ...] | None = None) -> Tensor:
    """What brings the largest magnitude (over `dim`, kept; over everything by default) to the kind's largest number.

    float32; 1 where all weights are zero.
    """
    magnitude = weight.float().abs()
    largest = magnitude.amax() if dim is None else magnitude.amax(dim=dim, keepdim=True)
    scale = largest / torch.finfo(DTYPES[kind]).max
    return torch.where(scale == 0, torch.ones_like(scale), scale)

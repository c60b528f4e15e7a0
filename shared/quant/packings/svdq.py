"""SVDQuant: 4-bit codes behind a smoothing vector, and beside them a low-rank branch in 16 bits.

Shape legend:  N rows (outputs)   K columns (inputs)   R rank   G = K / group, groups of columns sharing a scale

    W = Q * scales * row_scale / smooth + up @ down          y = x W^T

Outliers are what 4 bits cannot hold. Smoothing moves those of the activations into the weight (x / smooth goes with
W * smooth), the branch takes the largest directions out of the smoothed weight, and only the rest is rounded. The
branch sees x as it is, not x / smooth: whoever made the weight has divided `down` by `smooth` already.

One row worked, two columns of one group, R = 1:
    codes 0xD3 (low nibble first): int4 3, -3;  scale 0.5, row_scale 1, smooth [2, 1]  ->  [3 * 0.5 / 2, -3 * 0.5 / 1]
    up [[2]], down [[0.25, -1]]                                                        ->  [0.5, -2]
    W = [0.75 + 0.5, -1.5 - 2] = [1.25, -3.5]
As fp4 the same byte holds E2M1 codes 3 and 13: 1.5 and -3.

    tensor     shape     type                  what
    codes      (N, K/2)  uint8                 two per byte, even column in the low nibble
    scales     (N, G)    16-bit float or e4m3  int4: groups of 64; fp4: groups of 16
    row_scale  (N, 1)    float32               fp4's tensor and channel scales in one; ones for int4
    smooth     (K,)      16-bit float
    down, up   (R, K), (N, R)  16-bit float

They may also lie as a file has them, under other names (svdq_tiles.py): everything here works on both.

Paper: Li et al. 2024, arXiv 2411.05007. Formula: formats.md 3.6, after nunchaku's gemm_w4a4.cuh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from shared.quant import e2m1
from shared.quant.packings import svdq_tiles
from shared.quant.pieces import Stackable

Kind = Literal["int4", "fp4"]

# What the 16 codes stand for. int4 is two's complement.
_VALUES: dict[Kind, tuple[float, ...]] = {"int4": (*range(8), *range(-8, 0)), "fp4": e2m1.VALUES}

_BY_ROW = ("codes", "scales", "row_scale", "up")
_SHARED = ("smooth", "down")


@dataclass(frozen=True)
class Svdq(Stackable):
    """SVDQuant of either kind, of any rank."""

    kind: Kind

    @property
    def name(self) -> str:
        return "svdq"

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        tensors = svdq_tiles.in_order(tensors)
        weight = self.residual(tensors, torch.float32).div_(tensors["smooth"].float())
        return weight.addmm_(tensors["up"].float(), tensors["down"].float()).to(dtype)

    def residual(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The 4-bit part of the smoothed weight, Q * scales * row_scale: (N, K), new memory. Of tensors in order."""
        scales = (tensors["scales"].float() * tensors["row_scale"]).to(dtype)
        weight = decode(tensors["codes"], self.kind, dtype)
        weight.view(*scales.shape, -1).mul_(scales[..., None])
        return weight

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Views; but a copy in order where tiles would have to be cut."""
        if svdq_tiles.are_as_in_a_file(tensors) and svdq_tiles.are_whole(start, stop):
            return svdq_tiles.take_rows(tensors, start, stop)
        tensors = svdq_tiles.in_order(tensors)
        return {name: tensors[name] for name in _SHARED} | {name: tensors[name][start:stop] for name in _BY_ROW}

    def stack_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]] | None:
        """As Stackable's, in order or in tiles. None unless all lie in the same way and share smoothing and `down`."""
        first = parts[0]
        shared = [name for name in (*_SHARED, *svdq_tiles.SHARED) if name in first]
        if any(part.keys() != first.keys() or svdq_tiles.are_scattered(part) for part in parts):
            return None
        if not _share(parts, shared):
            return None
        return {name: [first[name]] if name in shared else [part[name] for part in parts] for name in first}

    def join_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        """None unless all parts have the same smoothing and the same `down`. Tiles stay where they are."""
        if all(svdq_tiles.are_as_in_a_file(tensors) for tensors in parts):
            return svdq_tiles.join_rows(parts) if _share(parts, svdq_tiles.SHARED) else None
        parts = [svdq_tiles.in_order(tensors) for tensors in parts]
        if not _share(parts, _SHARED):
            return None
        first = parts[0]
        return {name: first[name] for name in _SHARED} | {name: torch.cat([p[name] for p in parts]) for name in _BY_ROW}


def decode(codes: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """Codes (N, K/2) uint8 -> their numbers (N, K), exact in every float type of 16 bits or more."""
    pairs = torch.index_select(_pairs(kind, dtype, codes.device), 0, codes.flatten().int())
    return pairs.view(dtype).view(codes.shape[0], -1)


@cache
def _pairs(kind: Kind, dtype: torch.dtype, device: torch.device) -> Tensor:
    """256 integers whose bits are the two numbers of a byte side by side, so that one look-up gives both."""
    values = _VALUES[kind]
    table = torch.tensor([(values[byte & 15], values[byte >> 4]) for byte in range(256)], dtype=dtype)
    return table.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).flatten().to(device)


def _share(parts: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> bool:
    first = parts[0]
    return all(_equal(part[name], first[name]) for part in parts[1:] for name in names)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))

"""8-bit integers with float scales: W[n, k] = codes[n, k] * scale[n, k // group].

Usually one scale serves a whole row. With a row of maximum 2.54 the writer takes scale = 2.54 / 127 = 0.02, so 0.31
becomes round(15.5) = 16 and reads back as 0.32. A single scale for the matrix is repeated for every row, so that
matrices that had one each can lie on top of each other; block scales are repeated along the rows of their block.

**ConvRot** (ComfyUI's `convrot`): one outlier in a row makes its scale coarse for all its numbers. So the row is cut
into groups of `rotation` columns and each group g is kept as g H, with H a rotation that spreads an outlier over the
group: a Hadamard matrix of size 4^k, the Kronecker power of

        1  1  1 -1
        1  1 -1  1        (4, 0, 0, 0) H4 / 2 = (2, 2, 2, -2)
        1 -1  1  1
       -1  1  1  1

over sqrt(4^k). It is symmetric and its own inverse, H H = 1, so the same product brings the weight back. All its rows
sum to +sqrt(size), unlike Sylvester's, whose first row of ones gathers the mean of a group in one number.
Sources: formats.md 2.1, 4.4; comfy-kitchen 0.2.40 tensor/int8_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from shared.quant.packing import Packed
from shared.quant.packings import scale_rows
from shared.quant.pieces import Stackable

# Where the writer puts a row's largest magnitude. -128 is never written but may be read.
MAX_CODE = 127


@dataclass(frozen=True)
class Int8(Stackable):
    """Tensors: `codes` (rows, columns) int8, `scale` (rows, groups) float32. rotation: ConvRot's group, 0 for none.

    Of several groups the scale may have fewer rows, each for some of the matrix's (scale_rows.py).
    """

    rotation: int = 0

    @property
    def name(self) -> str:
        return "int8"

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes, scale = tensors["codes"], tensors["scale"]
        scale = scale_rows.spread(scale, len(codes))
        weight: Tensor = (codes.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)).flatten(1)
        if self.rotation:
            weight = rotate(weight, self.rotation)
        return weight.to(dtype)

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        codes, scale = tensors["codes"], tensors["scale"]
        return {"codes": codes[start:stop], "scale": scale_rows.cut(scale, len(codes), start, stop)}

    def stack_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]] | None:
        if len({p["scale"].shape[1] for p in parts}) > 1:
            return None
        codes = [p["codes"] for p in parts]
        return {"codes": codes, "scale": scale_rows.stacked([p["scale"] for p in parts], [len(c) for c in codes])}


def pack(codes: Tensor, scale: Tensor, rotation: int = 0) -> Packed:
    """codes: (rows, columns) int8. scale: (1 or rows, groups) float, groups dividing columns; of several groups it may
    have fewer rows."""
    rows, columns = codes.shape
    scale = scale.float()
    tensors = {"codes": codes, "scale": scale if scale.shape[1] > 1 else scale.expand(rows, -1).contiguous()}
    return Packed(Int8(rotation), (rows, columns), tensors)


def quantize(
    weight: Tensor, *, per_row: bool = True, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns) int8 and scales (rows, 1), or () for the whole matrix, by the largest magnitude.

    Rows of zeros get the scale 1. Relative error on Gaussian weights: 0.0070 for rows of 256, 0.0087 for rows of 3840;
    with one scale 0.0115 for 1024 of those.
    """
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True) if per_row else weight.abs().amax()
    scale = (largest / MAX_CODE).to(scale_dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (weight / scale.float()).round().clamp(-MAX_CODE, MAX_CODE)
    return codes.to(torch.int8), scale


def rotate(weight: Tensor, size: int) -> Tensor:
    """Each group of `size` columns times the Hadamard matrix of that size; a second time undoes it. float32."""
    rotated: Tensor = weight.float().unflatten(1, (-1, size)) @ hadamard(size, weight.device)
    return rotated.flatten(1)


def rotate_activations(x: Tensor, size: int) -> Tensor:
    """Activations (..., columns) turned as the weight's columns are, in their own type: then x W^T = (x H) (W H)^T.

    H's entries are powers of two, so that only the sums are rounded.
    """
    turned: Tensor = x.unflatten(-1, (-1, size)) @ hadamard(size, x.device).to(x.dtype)
    return turned.flatten(-2)


def is_rotation(size: int, columns: int) -> bool:
    """Whether ConvRot can have this group: a power of four that divides the columns."""
    return size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1 and columns % size == 0


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """The regular Hadamard matrix (size, size) over sqrt(size), size a power of four. Entries are exact."""
    four = torch.ones(4, 4, device=device) - 2 * torch.eye(4, device=device).flip(0)
    matrix: Tensor = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, four)
    return matrix / math.sqrt(size)

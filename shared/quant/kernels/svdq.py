"""SVDQuant in 16 (or 32) bits without the float32 product up @ down that dequantize() needs for every call.

T tokens, N rows, K columns, R rank. The 4-bit part is expanded in the activations' type and multiplied as usual, and
the branch is added in whichever order takes fewer multiplications:

    y = (x / smooth) Q^T + (x down^T) up^T       T R (K + N): few tokens, such as a caption or a small picture
    y = x (Q / smooth + up down)^T               N K R        many tokens: the branch joins the weight first

Both are at most what `dequantize` spends, N K R, and in the activations' type, where that one has to use float32.
For N = K = 3840 they are equal at T = 1920; for the feed-forward's 20480 x 3840 at T = 3233.

All but nunchaku's kernel and the compiled ones read the weight in order: in_order() is what they are laid out by.

FP4's scales are 8-bit floats, a type that Apple GPUs cannot even hold. There they are kept in bfloat16, which has all
of their numbers; every other packing keeps such numbers as bytes from the beginning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from shared.quant.kernels import Kernel, register
from shared.quant.packing import Packed
from shared.quant.packings import svdq_tiles
from shared.quant.packings.svdq import Svdq

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.linear import PackedLinear


def in_order(packed: Packed) -> Packed:
    """The weight as packings/svdq.py draws it, whichever way it lies; itself where it lies so."""
    if not svdq_tiles.are_tiles(packed.tensors):
        return packed
    return Packed(packed.packing, packed.shape, svdq_tiles.in_order(packed.tensors))


def lies_in_order(layer: PackedLinear) -> bool:
    return not svdq_tiles.are_tiles(layer.packed.tensors)


def _run(layer: PackedLinear, x: Tensor) -> Tensor:
    packed = layer.packed
    assert isinstance(packed.packing, Svdq)
    return with_branch(layer, x, packed.packing.residual(packed.tensors, x.dtype))


def with_branch(layer: PackedLinear, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's product, given the 4-bit part of its weight (N, K) in x's type, which is used up."""
    packed = layer.packed
    smooth, down, up = (packed.tensors[name].to(x.dtype) for name in ("smooth", "down", "up"))
    rows = len(weight)
    if branch_joins_weight(x, packed.shape):
        return F.linear(x, weight.div_(smooth).addmm_(up, down), layer.bias)
    result = F.linear(x / smooth, weight, layer.bias)
    return torch.addmm(result.view(-1, rows), F.linear(x, down).view(-1, len(down)), up.t()).view(result.shape)


def branch_joins_weight(x: Tensor, shape: tuple[int, int]) -> bool:
    """Whether it takes fewer multiplications to add up @ down to the weight (N, K) first, for these activations."""
    rows, columns = shape
    return x.numel() // columns * (rows + columns) > rows * columns


def _refuse(_layer: PackedLinear, _device: torch.device) -> str | None:
    return None


def _refuse_widening(layer: PackedLinear, device: torch.device) -> str | None:
    if device.type != "mps":
        return f"is for devices without 8-bit floats, the device is {device.type}"
    return None if _has_float8(layer.packed) else "there is no 8-bit float in it"


def _has_float8(packed: Packed) -> bool:
    return any(tensor.dtype == torch.float8_e4m3fn for tensor in packed.tensors.values())


def _widened(packed: Packed) -> Packed:
    """The same numbers with scales of 16 bits."""
    tensors = svdq_tiles.in_order(packed.tensors)
    tensors = {n: t.to(torch.bfloat16) if t.dtype == torch.float8_e4m3fn else t for n, t in tensors.items()}
    return Packed(packed.packing, packed.shape, tensors)


register(
    Kernel(
        name="svdq-split-wide", packing="svdq", compute="bf16", priority=15, refuse=_refuse_widening, run=_run,
        arrange=_widened, expands=True,
    )
)  # fmt: skip
register(
    Kernel(
        name="svdq-split", packing="svdq", compute="bf16", priority=10, refuse=_refuse, run=_run,
        arrange=in_order, laid_out=lies_in_order, expands=True,
    )
)  # fmt: skip

"""SVDQuant INT4 by comfy-kitchen: activations rounded to 4 bits in groups of 64, the low-rank branch in the same code.

    y = round4(x / smooth) Q^T + (x down^T) up^T

The library wants scales (groups, rows) and `down` (columns, rank). Ours are the transposed matrices, so they are kept
in that order in memory and seen through a transposed view: the packing need not know. An offloader may lay them out
anew when it moves them; then they are put in order for each call, which costs time and changes nothing.
Source: comfy-kitchen 0.2.40, quantize_svdquant_w4a4(), scaled_mm_svdquant_w4a4(); CUDA from compute capability 8.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.quant.kernels import Kernel, comfy, register, svdq
from shared.quant.packing import Packed
from shared.quant.packings.svdq import Svdq

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.quant.linear import PackedLinear

CAPABILITY = (8, 0)
_OPERATIONS = ("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4")
_TRANSPOSED = ("scales", "down")


def _refuse(layer: PackedLinear, device: torch.device) -> str | None:
    packing = layer.packing
    assert isinstance(packing, Svdq)
    if packing.kind != "int4":
        return "multiplies INT4, this weight is FP4"
    if layer.weight.dtype.itemsize != 2:
        return "takes activations of 16 bits"
    return comfy.refuse(_OPERATIONS, CAPABILITY, device)


def _arrange(packed: Packed) -> Packed:
    packed = svdq.in_order(packed)
    turned = {name: packed.tensors[name].t().contiguous().t() for name in _TRANSPOSED}
    return Packed(packed.packing, packed.shape, {**packed.tensors, **turned})


def _run(layer: PackedLinear, x: Tensor) -> Tensor:
    import comfy_kitchen  # type: ignore[import-untyped]

    tensors = layer.packed.tensors
    smooth, up = (tensors[name].to(x.dtype) for name in ("smooth", "up"))
    scales, down = (tensors[name].to(x.dtype).t().contiguous() for name in _TRANSPOSED)
    tokens = comfy.flat(x)
    with comfy.insisted():
        rounded, scales_x, branch = comfy_kitchen.quantize_svdquant_w4a4(tokens, smooth, down)
        result: Tensor = comfy_kitchen.scaled_mm_svdquant_w4a4(
            rounded, tensors["codes"].view(rounded.dtype), scales_x, scales, branch, up, layer.bias
        )
    return comfy.as_output(result, x)


register(
    Kernel(name="comfy-svdq", packing="svdq", compute="native", priority=20, refuse=_refuse, run=_run, arrange=_arrange)
)

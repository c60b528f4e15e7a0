"""4-bit weights expanded by Triton in one pass, into memory that all layers share, then torch's own product.

    y = x expand(Q)^T + (x down^T) up^T      few tokens, as svdq.py decides: the branch beside the product
    y = x (expand(Q) + up down)^T            many tokens: the branch joins the weight first

Rounds no activations: the reference's numbers but for one rounding of the weight instead of two or three. torch expands
the same weight in six passes over 16- and 32-bit numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.ops import triton_ready
from shared.quant.kernels import Kernel, register
from shared.quant.kernels.svdq import branch_joins_weight, in_order, lies_in_order
from shared.quant.kernels.triton_8bit import why_not_four_bits, why_not_sides
from shared.quant.packings.svdq import Svdq

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.quant.linear import PackedLinear


def _refuse(layer: PackedLinear, device: torch.device) -> str | None:
    return why_not_four_bits(layer) or why_not_sides(layer) or triton_ready.why_not(device)


def _run(layer: PackedLinear, x: Tensor) -> Tensor:
    import torch
    import torch.nn.functional as F

    from shared.quant.kernels.triton_expand import FourBits, expand

    packed = layer.packed
    tensors = packed.tensors
    with triton_ready.launching():
        weight = expand(FourBits.of(packed), layer.scratch.take(packed.shape, x.dtype, x.device))
    if not isinstance(packed.packing, Svdq):
        return F.linear(x, weight, layer.bias)
    down, up = (tensors[name].to(x.dtype) for name in ("down", "up"))
    if branch_joins_weight(x, packed.shape):
        return F.linear(x, weight.addmm_(up, down), layer.bias)
    result = F.linear(x, weight, layer.bias)
    branch = F.linear(x, down).view(-1, len(down))
    return torch.addmm(result.view(-1, layer.out_features), branch, up.t()).view(result.shape)


for _packing in ("svdq", "nvfp4"):
    register(
        Kernel(
            name="triton-expand", packing=_packing, compute="bf16", priority=20, refuse=_refuse, run=_run, tried=True,
            arrange=in_order if _packing == "svdq" else None, laid_out=lies_in_order,
        )
    )  # fmt: skip

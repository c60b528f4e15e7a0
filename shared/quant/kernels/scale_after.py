"""8-bit weights whose scale is the same along a row: multiply the codes as they are, scale the result.

    y = (x codes^T) * scale          instead of          y = x (codes * scale)^T

All 256 codes of either packing are numbers that bfloat16 holds exactly, so a cast of one pass expands them, where
`dequantize` multiplies every weight in float32 and rounds it. No number of the activations is rounded but by ConvRot's
rotation, whose inverse they get (H is its own), rounded once as any activation is. Less work on every device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.ops import compiled_ready
from shared.quant.kernels import Kernel, register
from shared.quant.packing import Packed
from shared.quant.packings import fp8, int8

if TYPE_CHECKING:
    from shared.quant.linear import PackedLinear


def _refuse(layer: PackedLinear, _device: torch.device) -> str | None:
    if layer.weight.dtype != torch.bfloat16:  # float16 ends at 65504, below sums of codes; float32 saves no rounding
        return "for activations in bfloat16"
    scale = layer.packed.tensors.get("scale")
    if scale is None:
        return "this weight has no scale"
    return "its scales change along a row" if scale.shape[1] > 1 else None


def _run(layer: PackedLinear, x: Tensor) -> Tensor:
    packed = layer.packed
    codes, scale = packed.tensors["codes"], packed.tensors["scale"]
    if isinstance(packed.packing, fp8.Float8):
        numbers = _decoded(layer, x)
    else:
        assert isinstance(packed.packing, int8.Int8)
        numbers = codes.to(x.dtype)
        if packed.packing.rotation:
            x = int8.rotate_activations(x, packed.packing.rotation)
    result = F.linear(x, numbers).mul_(scale.to(x.dtype).t())
    return result if layer.bias is None else result.add_(layer.bias)


def _decoded(layer: PackedLinear, x: Tensor) -> Tensor:
    """FP8's codes in x's type; on a CPU by compiled code, in memory that all layers share."""
    packed = layer.packed
    assert isinstance(packed.packing, fp8.Float8)
    codes = packed.tensors["codes"]
    if not (codes.is_cpu and codes.is_contiguous()) or torch.is_grad_enabled() or compiled_ready.why_not() is not None:
        return fp8.decode(codes, packed.packing.kind, x.dtype)
    from shared.quant.kernels.compiled_expand import expand

    out = layer.scratch.take((layer.out_features, layer.in_features), x.dtype, x.device)
    expand(Packed(packed.packing, packed.shape, {"codes": codes}), out)
    return out


for _packing in ("int8", "fp8"):
    register(
        Kernel(
            name="scale-after", packing=_packing, compute="bf16", priority=10, refuse=_refuse, run=_run, expands=True
        )
    )

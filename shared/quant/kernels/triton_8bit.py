"""8-bit products by Triton: for 8-bit weights, and for 4-bit weights that are made 8 bits wide for each product.

    int8, FP8         y = round(x) codes^T                                       triton_matmul.py
    SVDQuant          y = round(x / smooth) round(Q * scales)^T + (x down^T) up^T, the branch added inside the product
    NVFP4             y = round(x) round(Q * scales)^T

Rounding the activations adds a relative error of 0.8 % (int8) or 2.6 % (E4M3) on normally distributed ones. Where the
operation before the layer has rounded them already (shared/ops/rounding.py), they come as codes and are multiplied as
they are. The widened weight goes into memory that all layers share (scratch.py).

Nothing here needs Triton before a layer is asked about a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from shared.ops import triton_ready
from shared.ops.rounding import CODES, Kind, Rounded
from shared.quant.kernels import Kernel, register
from shared.quant.kernels.svdq import in_order, lies_in_order
from shared.quant.packings.fp8 import Float8
from shared.quant.packings.int8 import Int8, rotate_activations
from shared.quant.packings.nvfp4 import Nvfp4
from shared.quant.packings.svdq import Svdq

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.quant.linear import PackedLinear

FP8_CAPABILITY = 89  # Triton multiplies E4M3 from here on
_SIDES = 16  # tensor cores multiply so many rows and columns at once, and rows then begin where 16 bytes can be loaded


def why_not_four_bits(layer: PackedLinear) -> str | None:
    """Why the 4-bit kernels cannot read this weight; None when they can."""
    packing = layer.packing
    if isinstance(packing, Nvfp4):
        return "its last block is padded" if packing.columns is not None else None
    return None


def why_not_sides(layer: PackedLinear) -> str | None:
    """Why a matrix of this layer's shape cannot be multiplied; None when it can."""
    if layer.out_features % _SIDES or layer.in_features % _SIDES:
        return f"{layer.out_features} x {layer.in_features} is not a multiple of {_SIDES} both ways"
    return None


def _refuse(layer: PackedLinear, device: torch.device, *, kind: Kind) -> str | None:
    packing = layer.packing
    if isinstance(packing, Float8) and packing.kind != "e4m3fn":
        return f"multiplies E4M3, this weight is {packing.kind.upper()}"
    if isinstance(packing, (Int8, Float8)):
        scale = layer.packed.tensors.get("scale")
        if scale is not None and scale.shape[1] > 1:
            return "its scales change along a row"
    elif (reason := why_not_four_bits(layer)) is not None:
        return reason
    if (reason := why_not_sides(layer)) is not None:
        return reason
    if device.type == "cuda" and kind == "fp8" and 0 < triton_ready.capability(device) < FP8_CAPABILITY:
        return "needs compute capability 8.9"
    return triton_ready.why_not(device)


def _takes(layer: PackedLinear, *, kind: Kind) -> Kind | None:
    """SVDQuant's activations are smoothed first and wanted as they are by its branch; ConvRot's are turned first."""
    packing = layer.packing
    rotated = isinstance(packing, Int8) and packing.rotation > 0
    return None if rotated or isinstance(packing, Svdq) else kind


def _run(layer: PackedLinear, x: Tensor | Rounded, *, kind: Kind) -> Tensor:
    from shared.ops import fused
    from shared.quant.kernels.triton_matmul import scaled_matmul

    packed = layer.packed
    tensors = packed.tensors
    smooth = branch = None
    if isinstance(packed.packing, Svdq):
        assert not isinstance(x, Rounded)
        smooth = tensors["smooth"]
        flat = x.reshape(-1, layer.in_features)
        branch = flat @ tensors["down"].to(x.dtype).t(), tensors["up"].to(x.dtype)
    elif isinstance(packed.packing, Int8) and packed.packing.rotation:
        assert not isinstance(x, Rounded)
        x = rotate_activations(x, packed.packing.rotation)
    with triton_ready.launching():
        a = x if isinstance(x, Rounded) else fused.round_rows(x, kind, smooth)
        codes, scale = _eight_bits(layer, kind)
        return scaled_matmul(a, codes, scale, layer.bias, branch)


def _eight_bits(layer: PackedLinear, kind: Kind) -> tuple[Tensor, Tensor]:
    """The weight's codes (N, K) and scales (N, 1)."""
    import torch

    packed = layer.packed
    tensors, rows = packed.tensors, layer.out_features
    if isinstance(packed.packing, (Int8, Float8)):
        codes = tensors["codes"].view(CODES[kind])
        scale = tensors["scale"] if "scale" in tensors else torch.ones(1, 1, device=codes.device)
        return codes, scale.expand(rows, 1).contiguous()
    from shared.quant.kernels.triton_expand import FourBits, expand_rounded

    codes = layer.scratch.take((rows, layer.in_features), CODES[kind], tensors["codes"].device)
    return codes, expand_rounded(FourBits.of(packed, smoothed=True), codes)


def _register(kind: Kind, packing: str, priority: int) -> None:
    register(
        Kernel(
            name=f"triton-{kind}",
            packing=packing,
            compute=kind,
            priority=priority,
            refuse=partial(_refuse, kind=kind),
            run=partial(_run, kind=kind),
            takes=partial(_takes, kind=kind),
            arrange=in_order if packing == "svdq" else None,
            laid_out=lies_in_order,
        )
    )


_register("int8", "int8", 15)
_register("fp8", "fp8", 15)
for _packing in ("svdq", "nvfp4"):
    _register("int8", _packing, 12)  # behind the kernels that multiply 4 bits, before E4M3: rounds three times finer
    _register("fp8", _packing, 11)

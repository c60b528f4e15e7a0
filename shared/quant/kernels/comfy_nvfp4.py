"""NVFP4 weights times activations rounded to NVFP4, by comfy-kitchen on Blackwell's 4-bit cores.

The weight's block scales lie in files as the cores read them (swizzle.py); elsewhere they are put so when the kernel is
chosen. Which column comes first in a byte makes no difference, as long as the activations are packed as the weight is.
The activations get one scale above their blocks', max|x| / (448 * 6), from the activations themselves: nothing waits
for the CPU. A matrix joined of parts may have several tensor scales; the product takes the first, and the rows get the
rest afterwards.
Source: comfy-kitchen 0.2.40, quantize_nvfp4(), scaled_mm_nvfp4(); cuBLAS from compute capability 10.0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.quant import e2m1
from shared.quant.kernels import Kernel, comfy, register
from shared.quant.packing import Packed
from shared.quant.packings.nvfp4 import Nvfp4
from shared.quant.swizzle import swizzle

if TYPE_CHECKING:
    from shared.quant.linear import PackedLinear

CAPABILITY = (10, 0)
_OPERATIONS = ("quantize_nvfp4", "scaled_mm_nvfp4")
_ROWS, _COLUMNS = 8, 32  # sides of the matrices, cuBLAS
_E4M3_MAX = 448.0


def _refuse(layer: PackedLinear, device: torch.device) -> str | None:
    packing = layer.packing
    assert isinstance(packing, Nvfp4)
    if packing.columns is not None:
        return f"its rows end within a block ({packing.columns} columns)"
    if layer.out_features % _ROWS or layer.in_features % _COLUMNS:
        return f"{layer.out_features} x {layer.in_features} is not a multiple of {_ROWS} x {_COLUMNS}"
    if layer.weight.dtype.itemsize != 2:
        return "takes activations of 16 bits"
    if layer.weight.dtype == torch.float16:
        return "products before their row scales leave float16's range"
    return comfy.refuse(_OPERATIONS, CAPABILITY, device)


def _arrange(packed: Packed) -> Packed:
    assert isinstance(packed.packing, Nvfp4)
    tensors = dict(packed.tensors)
    if not packed.packing.swizzled:
        tensors["block_scales"] = swizzle(tensors["block_scales"])
    if (tensors["tensor_scale"] == tensors["tensor_scale"][0]).all():
        tensors["tensor_scale"] = tensors["tensor_scale"][:1].clone()
    return Packed(replace(packed.packing, swizzled=True), packed.shape, tensors)


def _run(layer: PackedLinear, x: Tensor) -> Tensor:
    import comfy_kitchen  # type: ignore[import-untyped]

    tensors, packing = layer.packed.tensors, layer.packing
    assert isinstance(packing, Nvfp4)
    assert packing.swizzled
    tokens = comfy.flat(x)
    largest = tokens.abs().amax().float().clamp_(min=torch.finfo(torch.float32).tiny * _E4M3_MAX * e2m1.MAX)
    scale_x = largest / (_E4M3_MAX * e2m1.MAX)
    scale = tensors["tensor_scale"]
    with comfy.insisted():
        codes, blocks = comfy_kitchen.quantize_nvfp4(tokens, scale_x, pad_16x=True, hi_first=not packing.low_first)
        result: Tensor = comfy_kitchen.scaled_mm_nvfp4(
            codes,
            tensors["codes"],
            scale_x,
            scale[0, 0],
            blocks,
            tensors["block_scales"].view(torch.float8_e4m3fn),
            out_dtype=x.dtype,
        )
    if len(scale) > 1:
        result = result * (scale / scale[0]).to(x.dtype).t()
    return comfy.as_output(result, x, layer.bias)


register(
    Kernel(
        name="comfy-nvfp4", packing="nvfp4", compute="native", priority=20, refuse=_refuse, run=_run, arrange=_arrange
    )
)

"""MXFP8 weights times activations rounded to MXFP8: comfy-kitchen rounds, torch's scaled_mm multiplies, on Blackwell.

The weight's exponents lie in files as the cores read them (swizzle.py); elsewhere they are put so when the kernel is
chosen.
Source: comfy-kitchen 0.2.40, quantize_mxfp8(), scaled_mm_mxfp8() (torch.nn.functional.scaled_mm); cuBLAS from compute
capability 10.0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.quant.kernels import Kernel, comfy, register
from shared.quant.packing import Packed
from shared.quant.packings.mxfp8 import BLOCK, Mxfp8
from shared.quant.swizzle import swizzle

if TYPE_CHECKING:
    from shared.quant.linear import PackedLinear

CAPABILITY = (10, 0)
_ROWS = 16  # cuBLAS


def _refuse(layer: PackedLinear, device: torch.device) -> str | None:
    packing = layer.packing
    assert isinstance(packing, Mxfp8)
    if packing.columns is not None:
        return f"its rows end within a block ({packing.columns} columns)"
    if layer.out_features % _ROWS or layer.in_features % BLOCK:
        return f"{layer.out_features} x {layer.in_features} is not a multiple of {_ROWS} x {BLOCK}"
    if layer.weight.dtype != torch.bfloat16:
        return "for activations in bfloat16"
    return comfy.refuse(("quantize_mxfp8",), CAPABILITY, device)


def _arrange(packed: Packed) -> Packed:
    assert isinstance(packed.packing, Mxfp8)
    exponents = swizzle(packed.tensors["exponents"])
    return Packed(replace(packed.packing, swizzled=True), packed.shape, {**packed.tensors, "exponents": exponents})


def _laid_out(layer: PackedLinear) -> bool:
    packing = layer.packing
    assert isinstance(packing, Mxfp8)
    return packing.swizzled


def _run(layer: PackedLinear, x: Tensor) -> Tensor:
    import comfy_kitchen  # type: ignore[import-untyped]

    assert _laid_out(layer)
    tensors = layer.packed.tensors
    tokens = comfy.flat(x)
    with comfy.insisted():
        numbers, exponents = comfy_kitchen.quantize_mxfp8(tokens, pad_32x=True)
    result: Tensor = comfy_kitchen.scaled_mm_mxfp8(
        numbers,
        tensors["codes"].view(torch.float8_e4m3fn),
        exponents,
        tensors["exponents"].view(torch.float8_e8m0fnu),
        out_dtype=x.dtype,
    )
    return comfy.as_output(result, x, layer.bias)


register(
    Kernel(
        name="comfy-mxfp8",
        packing="mxfp8",
        compute="native",
        priority=20,
        refuse=_refuse,
        run=_run,
        arrange=_arrange,
        laid_out=_laid_out,
    )
)

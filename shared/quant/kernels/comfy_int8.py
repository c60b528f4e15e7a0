"""int8 weights by comfy-kitchen's int8_linear: activations rounded to int8 token by token, with ConvRot's rotation.

The arithmetic of torch_int8.py in fused CUDA code: rounding, product and scaling in two launches.
Source: comfy-kitchen 0.2.40, int8_linear(); CUDA from compute capability 7.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.quant.kernels import Kernel, comfy, register
from shared.quant.packings.int8 import Int8

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.quant.linear import PackedLinear

CAPABILITY = (7, 5)
_MULTIPLE = 16  # of columns: it reads 16 bytes at once


def _refuse(layer: PackedLinear, device: torch.device) -> str | None:
    if layer.packed.tensors["scale"].shape[1] > 1:
        return "its scales change along a row"
    if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
        return f"{layer.out_features} x {layer.in_features} is not a multiple of {_MULTIPLE} both ways"
    return comfy.refuse(("int8_linear",), CAPABILITY, device)


def _run(layer: PackedLinear, x: Tensor) -> Tensor:
    import comfy_kitchen  # type: ignore[import-untyped]

    packed = layer.packed
    assert isinstance(packed.packing, Int8)
    with comfy.insisted():
        result: Tensor = comfy_kitchen.int8_linear(
            comfy.flat(x),
            packed.tensors["codes"],
            packed.tensors["scale"].flatten(),
            layer.bias,
            out_dtype=x.dtype,
            convrot=packed.packing.rotation > 0,
            convrot_groupsize=packed.packing.rotation or 256,
        )
    return comfy.as_output(result, x)


register(Kernel(name="comfy-int8", packing="int8", compute="int8", priority=20, refuse=_refuse, run=_run))

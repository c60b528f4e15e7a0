"""E4M3 weights times activations rounded to E4M3, token by token: torch._scaled_mm, on NVIDIA GPUs and CPUs.

    scale_x = max|x| / 448 of each token;  y = (e4m3(x / scale_x) codes^T) * scale_x * scale

Rounding the activations adds a relative error of 2.6 % on normally distributed ones, as much as the weight itself has.
CPUs have no such instructions: torch expands both sides there, which is for checking numbers, not for speed.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.ops.rounding import Kind, Rounded, round_rows
from shared.quant.kernels import Kernel, register
from shared.quant.packings.fp8 import Float8

if TYPE_CHECKING:
    from shared.quant.linear import PackedLinear

CAPABILITY = (8, 9)
_MULTIPLE = 16  # sides of the matrices, in bytes: what cuBLAS and CUTLASS load at once


def _refuse(layer: PackedLinear, device: torch.device) -> str | None:
    packing = layer.packing
    assert isinstance(packing, Float8)
    if packing.kind != "e4m3fn":
        return f"multiplies E4M3, this weight is {packing.kind.upper()}"
    scale = layer.packed.tensors.get("scale")
    if scale is not None and scale.shape[1] > 1:
        return "its scales change along a row"
    if layer.weight.dtype != torch.bfloat16:
        return "scales by rows give bfloat16 only"
    if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
        return f"{layer.out_features} x {layer.in_features} is not a multiple of {_MULTIPLE} both ways"
    if device.type == "cpu":
        return _refusal_of_cpus()
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU or a CPU, the device is {device.type}"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "needs compute capability 8.9"
    return None


@cache
def _refusal_of_cpus() -> str | None:
    """Whether this torch multiplies by scales of rows on CPUs, which 2.11 did not yet."""
    codes, scale = torch.zeros(_MULTIPLE, _MULTIPLE, dtype=torch.float8_e4m3fn), torch.ones(_MULTIPLE, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return f"torch {torch.__version__} has no scales by rows on CPUs"
    return None


def _takes(layer: PackedLinear) -> Kind | None:
    return "fp8" if layer.packed.tensors["codes"].is_cuda else None


def _run(layer: PackedLinear, x: Tensor | Rounded) -> Tensor:
    tensors = layer.packed.tensors
    tokens = x if isinstance(x, Rounded) else round_rows(x, "fp8")
    rows = layer.out_features
    scale = tensors["scale"] if "scale" in tensors else torch.ones(1, 1, device=tokens.scale.device)
    result = torch._scaled_mm(
        tokens.codes.view(-1, layer.in_features),
        tensors["codes"].view(torch.float8_e4m3fn).t(),
        tokens.scale,
        scale.expand(rows, 1).t().contiguous(),
        out_dtype=tokens.dtype,
    )
    if layer.bias is not None:
        result.add_(layer.bias)
    return result.view(*tokens.codes.shape[:-1], rows)


register(Kernel(name="torch-fp8", packing="fp8", compute="fp8", priority=10, refuse=_refuse, run=_run, takes=_takes))

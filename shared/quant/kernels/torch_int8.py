"""int8 weights times activations rounded to int8, token by token: torch._int_mm, on NVIDIA GPUs and CPUs.

    scale_x = max|x| / 127 of each token;  y = (round(x / scale_x) codes^T) * scale_x * scale

The integers are multiplied and summed exactly, in 32 bits (K up to 133 000 columns fit). Rounding the activations adds
a relative error of 0.8 % on normally distributed ones, about that of the weight itself. ConvRot's rotation is applied
to the activations, which levels their outliers too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.quant.kernels import Kernel, register
from shared.quant.packings import int8

if TYPE_CHECKING:
    from shared.quant.linear import PackedLinear

CAPABILITY = (8, 0)
# cuBLAS multiplies int8 matrices whose sides are multiples of 8 and which have more than 16 rows.
_CUDA_MULTIPLE, _CUDA_TOKENS = 8, 17

# In smaller layers rounding the activations costs what the product saves: measured from 0.8 to 1.2 times as fast.
_LARGE = 2048

# Numbers whose float32 copies, two at a time, fit into the second cache of a core.
_CACHED = 2**16

# Instructions that multiply int8 and add to int32, as torch.cpu.get_capabilities() calls them.
_INT8_UNITS = ("amx_int8", "avx512_vnni")


def _refuse(layer: PackedLinear, device: torch.device) -> str | None:
    if layer.packed.tensors["scale"].shape[1] > 1:
        return "its scales change along a row"
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU or a CPU, the device is {device.type}"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "needs compute capability 8.0"
    if layer.in_features % _CUDA_MULTIPLE or layer.out_features % _CUDA_MULTIPLE:
        return f"{layer.out_features} x {layer.in_features} is not a multiple of {_CUDA_MULTIPLE} both ways"
    return None


def _known(layer: PackedLinear, device: torch.device) -> str | None:
    """On CPUs with int8 instructions 1.6 to 2.0 times as fast as scale-after: docs/compute.md, "Measured"."""
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return None
    if min(layer.in_features, layer.out_features) < _LARGE:
        return None
    features = torch.cpu.get_capabilities()
    unit = next((name for name in _INT8_UNITS if features.get(name)), None)
    return None if unit is None else f"measured 1.6 times as fast as expanding, or more, on CPUs with {unit}"


def _run(layer: PackedLinear, x: Tensor) -> Tensor:
    packed = layer.packed
    assert isinstance(packed.packing, int8.Int8)
    flat = x.reshape(-1, layer.in_features)
    if packed.packing.rotation:
        flat = int8.rotate_activations(flat, packed.packing.rotation)
    tokens = len(flat)
    if flat.is_cuda and tokens < _CUDA_TOKENS:
        flat = F.pad(flat, (0, 0, 0, _CUDA_TOKENS - tokens))
    codes, scale = round_tokens(flat)
    sums = torch._int_mm(codes, packed.tensors["codes"].t())
    result = scaled(sums, scale, packed.tensors["scale"].t(), x.dtype)[:tokens]
    if layer.bias is not None:
        result.add_(layer.bias)
    return result.view(*x.shape[:-1], layer.out_features)


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (T, K) -> int8 codes (T, K) and float32 scales (T, 1); a token of zeros gets zeros."""
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty(len(x), 1, dtype=torch.float32)
    step = _at_once(x)
    for some, code, scale in zip(x.split(step), codes.split(step), scales.split(step), strict=True):
        numbers = some.float()
        scale.copy_(numbers.abs().amax(dim=1, keepdim=True).div_(int8.MAX_CODE))
        scale.clamp_(min=torch.finfo(torch.float32).tiny)
        code.copy_((numbers / scale).round_())
    return codes, scales


def scaled(sums: Tensor, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """sums (T, N) int32 * row (T, 1) * column (1, N), float32, in `dtype`."""
    result = sums.new_empty(sums.shape, dtype=dtype)
    step = _at_once(sums)
    for some, out, factor in zip(sums.split(step), result.split(step), row.split(step), strict=True):
        out.copy_(some.float().mul_(factor).mul_(column))
    return result


def _at_once(x: Tensor) -> int:
    """Rows to work on at once: on a CPU what its second cache holds, for half the time; elsewhere all of them."""
    return max(_CACHED // x.shape[1], 1) if x.is_cpu else max(len(x), 1)


register(Kernel(name="torch-int8", packing="int8", compute="int8", priority=10, refuse=_refuse, run=_run, known=_known))

"""int8 weights times activations rounded to int8, token by token: torch._int_mm, on NVIDIA GPUs and CPUs.

    scale_x = max|x| / 127 of each token;  y = (round(x / scale_x) codes^T) * scale_x * scale

The integers are multiplied and summed exactly, in 32 bits (K up to 133 000 columns fit). Rounding the activations adds
a relative error of 0.8 % on normally distributed ones, about that of the weight itself. ConvRot's rotation is applied
to the activations, which levels their outliers too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.ops import compiled_ready
from shared.ops.rounding import Kind, Rounded, Sums
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


def known(layer: PackedLinear, device: torch.device) -> str | None:
    """See Kernel: with int8 instructions 1.6 to 2.0 times as fast as scale-after: docs/compute.md, "Measured"."""
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return None
    if min(layer.in_features, layer.out_features) < _LARGE:
        return None
    features = torch.cpu.get_capabilities()
    unit = next((name for name in _INT8_UNITS if features.get(name)), None)
    return None if unit is None else f"measured 1.6 times as fast as expanding, or more, on CPUs with {unit}"


def _run(layer: PackedLinear, x: Tensor | Rounded) -> Tensor:
    result = scaled(_sums(layer, x))
    return result if layer.bias is None else result.add_(layer.bias)


def _sums(layer: PackedLinear, x: Tensor | Rounded) -> Sums:
    """The product as it comes, before its scales and the bias."""
    packed = layer.packed
    assert isinstance(packed.packing, int8.Int8)
    if packed.packing.rotation:
        assert not isinstance(x, Rounded)
        x = int8.rotate_activations(x, packed.packing.rotation)
    return product(x, packed.tensors["codes"], packed.tensors["scale"])


def product(x: Tensor | Rounded, codes: Tensor, scale: Tensor) -> Sums:
    """x (..., K), rounded here unless it is already, times int8 codes (N, K) with scales (N, 1)."""
    lead = (x.codes if isinstance(x, Rounded) else x).shape[:-1]
    if isinstance(x, Rounded):
        left, row = x.codes.view(-1, codes.shape[1]), x.scale
    else:
        flat = x.reshape(-1, codes.shape[1])
        if flat.is_cuda and len(flat) < _CUDA_TOKENS:
            flat = F.pad(flat, (0, 0, 0, _CUDA_TOKENS - len(flat)))
        left, row = round_tokens(flat)
    tokens = lead.numel()
    sums = torch._int_mm(left, codes.t())[:tokens]
    return Sums(sums, row[:tokens], scale, torch.Size((*lead, len(codes))), x.dtype)


def _takes(layer: PackedLinear) -> Kind | None:
    """On CPUs int8, unless the activations have to be rotated first."""
    assert isinstance(layer.packing, int8.Int8)
    return None if layer.packing.rotation or not layer.packed.tensors["codes"].is_cpu else "int8"


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (T, K) -> int8 codes (T, K) and float32 scales (T, 1); a token of zeros gets zeros."""
    if (compiled := _compiled(x)) is not None:
        rounded = compiled.round_rows(x)
        return rounded.codes, rounded.scale
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty(len(x), 1, dtype=torch.float32)
    step = _at_once(x)
    for some, code, scale in zip(x.split(step), codes.split(step), scales.split(step), strict=True):
        numbers = some.float()
        scale.copy_(numbers.abs().amax(dim=1, keepdim=True).div_(int8.MAX_CODE))
        scale.clamp_(min=torch.finfo(torch.float32).tiny)
        code.copy_((numbers / scale).round_())
    return codes, scales


def scaled(sums: Sums) -> Tensor:
    """The numbers that the sums stand for."""
    if (compiled := _compiled(sums.sums)) is not None:
        numbers: Tensor = compiled.scaled(sums)
        return numbers
    whole = sums.sums
    result = whole.new_empty(whole.shape, dtype=sums.dtype)
    column, step = sums.column.t(), _at_once(whole)
    for some, out, factor in zip(whole.split(step), result.split(step), sums.row.split(step), strict=True):
        out.copy_(some.float().mul_(factor).mul_(column))
    return result.view(sums.shape)


def _compiled(x: Tensor) -> Any:
    """The module with one pass for each of these, None where it does not serve."""
    if not x.is_cpu or torch.is_grad_enabled() or compiled_ready.why_not() is not None:
        return None
    from shared.ops import compiled

    return compiled


def _at_once(x: Tensor) -> int:
    """Rows to work on at once: on a CPU what its second cache holds, for half the time; elsewhere all of them."""
    return max(_CACHED // x.shape[1], 1) if x.is_cpu else max(len(x), 1)


register(
    Kernel(
        name="torch-int8",
        packing="int8",
        compute="int8",
        priority=10,
        refuse=_refuse,
        run=_run,
        known=known,
        takes=_takes,
        sums=_sums,
    )
)

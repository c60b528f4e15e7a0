"""16-bit numbers made float32 for each product, in memory that all layers share: see packings/half.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from shared.quant.kernels import Kernel, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.quant.linear import PackedLinear


def _refuse(_layer: PackedLinear, device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"is for CPUs, the device is {device.type}"


def _run(layer: PackedLinear, x: Tensor) -> Tensor:
    weight = layer.scratch.take((layer.out_features, layer.in_features), x.dtype, x.device)
    return F.linear(x, weight.copy_(layer.packed.tensors["numbers"]), layer.bias)


register(Kernel(name="widened", packing="16-bit", compute="bf16", priority=10, refuse=_refuse, run=_run, expands=True))

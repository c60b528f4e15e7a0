"""Expand the weight to the activations' type, then torch's own linear: serves every packing on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from shared.quant.kernels import ANY, Kernel, register

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.linear import PackedLinear


def _run(layer: PackedLinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.packed.dequantize(x.dtype), layer.bias)


register(
    Kernel(
        name="dequantize",
        packing=ANY,
        compute="bf16",
        priority=0,
        refuse=lambda _layer, _device: None,
        run=_run,
        expands=True,
    )
)

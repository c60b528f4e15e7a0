"""Plain numbers of another type, cast once: see packings/other_type.py. Then torch's own product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from shared.quant.kernels import Kernel, register
from shared.quant.packing import Packed
from shared.quant.packings.other_type import OtherType

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.linear import PackedLinear


def _arrange(packed: Packed) -> Packed:
    packing = packed.packing
    assert isinstance(packing, OtherType)
    return Packed(packing, packed.shape, packing.of([packed.dequantize(packing.computed)]))


def _laid_out(layer: PackedLinear) -> bool:
    packing, tensors = layer.packing, layer.packed.tensors
    assert isinstance(packing, OtherType)
    return len(tensors) == 1 and tensors["0"].dtype == packing.computed


def _run(layer: PackedLinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.packed.tensors["0"], layer.bias)


register(
    Kernel(
        name="cast",
        packing=OtherType.name,
        compute="bf16",
        priority=10,
        refuse=lambda _layer, _device: None,
        run=_run,
        arrange=_arrange,
        laid_out=_laid_out,
    )
)

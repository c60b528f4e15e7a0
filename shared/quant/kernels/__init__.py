"""Which code multiplies by a packed weight: a table of kernels, asked once per layer and device.

A kernel says which packing it serves, and refuses a layer in words ("needs compute capability 8.0, this GPU has
7.5"). The first that does not refuse wins, in order of priority. `dequantize` (expand, then torch's own linear) serves
everything everywhere and comes last.

A new kernel is one module here that calls register() when imported, named in _MODULES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from shared.quant.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.quant.linear import PackedLinear

_MODULES = ("svdq", "dequantize")
ANY = "*"


@dataclass(frozen=True)
class Kernel:
    """One way to compute y = x W^T + b.

    packing: the name of the packing served, or ANY. compute: what is multiplied: "bf16" (whatever float type the
    activations have), "int8", "fp8" or "native" (4-bit cores). priority: higher is asked first.
    refuse: why not for this layer on this device, None if it can. run: the product, (..., in) -> (..., out).
    """

    name: str
    packing: str
    compute: str
    priority: int
    refuse: Callable[[PackedLinear, torch.device], str | None]
    run: Callable[[PackedLinear, Tensor], Tensor]


_registry: list[Kernel] = []


def register(kernel: Kernel) -> None:
    """Add a kernel to the table; called by the modules here when they are imported."""
    _registry.append(kernel)


def available(packing: str) -> list[Kernel]:
    """The kernels for a packing, first choice first."""
    if not _registry:
        for name in _MODULES:
            import_module(f"{__name__}.{name}")
    return sorted((k for k in _registry if k.packing in (packing, ANY)), key=lambda k: -k.priority)


def select(layer: PackedLinear, device: torch.device) -> Kernel:
    """The kernel for a layer on a device, honouring the layer's `compute`.

    Raises UserError listing every kernel's reason when none accepts.
    """
    refusals = []
    for kernel in available(layer.packing.name):
        reason = None
        if layer.compute not in ("auto", kernel.compute):
            reason = f"computes in {kernel.compute}, {layer.compute} was asked for"
        reason = reason or kernel.refuse(layer, device)
        if reason is None:
            return kernel
        refusals.append(f"{kernel.name}: {reason}")
    raise UserError(
        f"Nothing here multiplies {layer.packing.name} weights on {device} ({'; '.join(refusals)}).",
        "Use --compute auto.",
    )

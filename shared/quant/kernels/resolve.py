"""Choose the kernels of a whole model, once, when it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.quant.errors import UserError
from shared.quant.kernels import REFERENCE, Refusal, Selection, Trial, available, select
from shared.quant.pieces import outline

if TYPE_CHECKING:
    import torch
    from torch import nn

    from shared.quant.linear import PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Layers of a model that are packed alike and multiplied alike. reason: why so, of the first of them."""

    packing: str
    kernel: str
    compute: str
    layers: int
    reason: str
    refusals: tuple[Refusal, ...]

    def __str__(self) -> str:
        return f"{self.layers} {self.packing} layers by {self.kernel} ({self.compute}: {self.reason})"


def resolve(
    modules: Sequence[nn.Module], device: torch.device, compute: str = "auto", *, trial: Trial | None = None
) -> tuple[Resolved, ...]:
    """Choose a kernel for every packed layer of these modules on `device`, and lay its weight out for it.

    compute: one of kernels.COMPUTES. A layer that no kernel of this kind can take is multiplied in bf16, and says why.
    trial: as in select(); kernels/trial.py's try_out unless given. Layers stay on the device they are on. Raises
    UserError when there are packed layers and none of them can be computed as asked.
    """
    from shared.quant.kernels.scratch import Scratch
    from shared.quant.kernels.trial import try_out
    from shared.quant.linear import PackedLinear
    from shared.quant.packings.half import Half
    from shared.quant.packings.other_type import OtherType

    scratch = Scratch()
    found: dict[object, Selection] = {}
    groups: dict[tuple[str, Selection], int] = {}
    for layer in (layer for module in modules for layer in module.modules() if isinstance(layer, PackedLinear)):
        layer.compute, layer.scratch = compute, scratch
        key = _key(layer)
        if key not in found:
            found[key] = select(layer, device, trial or try_out)
        layer.use(found[key].kernel, device)
        group = (key[0], found[key])
        groups[group] = groups.get(group, 0) + 1
    result = _grouped(groups)
    packed = [r for r in result if r.packing not in (Half.name, OtherType.name)]  # plain numbers are as they are
    if packed and compute not in ("auto", REFERENCE) and all(r.compute != compute for r in packed):
        reasons = dict.fromkeys(f"{r.packing}: {_refusals(r, compute)}" for r in packed)
        raise UserError(
            f"Nothing computes this model's packed weights in {compute} on {device.type}: {'; '.join(reasons)}.",
            "Use --compute auto.",
        )
    return result


def _key(layer: PackedLinear) -> tuple[str, object]:
    """Layers with the same key get the same kernel."""
    packed = layer.packed
    return layer.packing.name, (
        layer.packing,
        packed.shape,
        outline(packed),
        layer.weight.dtype,
        layer.bias is not None,
    )


def _grouped(groups: dict[tuple[str, Selection], int]) -> tuple[Resolved, ...]:
    """One entry for each packing and kernel, however many shapes."""
    result: dict[tuple[str, str], Resolved] = {}
    for (packing, selection), layers in groups.items():
        kernel = selection.kernel
        earlier = result.get((packing, kernel.name))
        result[packing, kernel.name] = Resolved(
            packing=packing,
            kernel=kernel.name,
            compute=kernel.compute,
            layers=layers + (earlier.layers if earlier else 0),
            reason=earlier.reason if earlier else selection.reason,
            refusals=tuple(dict.fromkeys((*(earlier.refusals if earlier else ()), *selection.refusals))),
        )
    return tuple(result.values())


def _refusals(resolved: Resolved, compute: str) -> str:
    """What the kernels of the kind that was asked for said; those of other kinds could not have helped."""
    of_the_kind = {kernel.name for kernel in available(resolved.packing) if kernel.compute == compute}
    words = (f"{r.kernel} {r.reason}" for r in resolved.refusals if r.kernel in of_the_kind)
    return ", ".join(words) or "no such kernel exists"

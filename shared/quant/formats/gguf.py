"""GGUF's packed matrices, told by the number type that the file itself gives them (gguf_file/, packings/gguf.py).

The types that can be written are those the gguf package packs; K and IQ types are read only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.quant.formats import Layer
from shared.quant.gguf_file import BLOCKS, PREFIX

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.packing import Packed

NAME = "GGUF"
SUFFIXES: frozenset[str] = frozenset()
WRITABLE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def claims(layer: Layer) -> bool:
    return "weight" in layer.tensors and layer.tensors["weight"].dtype.startswith(PREFIX)


def shape(layer: Layer) -> tuple[int, int]:
    rows, columns = layer.tensors["weight"].shape
    return rows, columns


def describe(layer: Layer) -> dict[str, Any]:
    return {"format": f"GGUF {_type(layer)}"}


def read(layer: Layer) -> Packed:
    from shared.quant.packing import Packed
    from shared.quant.packings.gguf import GgufBlocks, is_readable

    kind = _type(layer)
    if not is_readable(kind):
        raise layer.fail(f"GGUF {kind} is a type that nothing here unpacks.", "Use a file of another type.")
    (blocks,) = layer.load("weight")
    rows, columns = shape(layer)
    return Packed(GgufBlocks(kind, columns), (rows, columns), {"blocks": blocks})


def check(layer: Layer, packed: Packed) -> None:
    """Raises CheckpointError for scales that make no numbers, or none that differ."""
    from shared.quant.packings.gguf import scales_are_finite, scales_are_lost

    kind, blocks = _type(layer), packed.tensors["blocks"]
    if not scales_are_finite(blocks, kind):
        raise layer.fail(f"a scale of its GGUF {kind} blocks is infinite or not a number.")
    if scales_are_lost(blocks, kind):
        raise layer.fail(f"every scale of its GGUF {kind} blocks is zero, but their numbers differ.")


def quantize(weight: Tensor, *, type: str = "Q8_0") -> dict[str, Tensor]:
    """Pack a float matrix (rows, columns) into {"weight": uint8 (rows, bytes per row)} for gguf_file.write().

    type: one of WRITABLE. Relative error on normal numbers: Q8_0 0.5 %, Q5_1 4 %, Q5_0 4 %, Q4_1 8 %, Q4_0 9 %.
    Raises ValueError for another type, columns that are no multiple of 32, numbers that no f16 scale can reach.
    """
    import torch
    from gguf import GGMLQuantizationType, quants

    from shared.quant.packings.gguf import scales_are_finite

    if type not in WRITABLE:
        raise ValueError(f"GGUF {type} cannot be written; these can: {', '.join(WRITABLE)}")
    block = BLOCKS[type][0]
    if weight.dim() != 2 or weight.shape[1] % block:
        raise ValueError(f"GGUF {type} packs matrices with a multiple of {block} columns, not {list(weight.shape)}")
    numbers = weight.detach().float().cpu().contiguous()
    if not numbers.isfinite().all() or numbers.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError(f"GGUF {type}: the weight holds numbers that are not finite, or beyond what f16 can scale")
    packed = torch.from_numpy(quants.quantize(numbers.numpy(), GGMLQuantizationType[type]))
    assert scales_are_finite(packed, type)
    return {"weight": packed}


def _type(layer: Layer) -> str:
    return layer.tensors["weight"].dtype.removeprefix(PREFIX)

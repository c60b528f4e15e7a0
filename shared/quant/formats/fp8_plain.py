"""Bare FP8: weights cast to F8_E4M3 or F8_E5M2 and nothing else; every value stands for itself.

Only matrices are kept so. Norms, biases and pad tokens that were cast along with them are plain numbers of a small
type (PLAIN_DTYPES): they cost nothing, and are widened when they are loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.quant.formats import Layer
from shared.quant.formats.fp8_scaled import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.packing import Packed

NAME = "FP8"
SUFFIXES: frozenset[str] = frozenset()


def claims(layer: Layer) -> bool:
    weight = layer.tensors.get("weight")
    return (
        weight is not None
        and weight.dtype in KINDS
        and len(weight.shape) == 2
        and not layer.marker
        and layer.tensors.keys() <= {"weight", "bias"}
    )


def shape(layer: Layer) -> tuple[int, int]:
    rows, columns = layer.tensors["weight"].shape
    return rows, columns


def describe(layer: Layer) -> dict[str, Any]:
    return {"format": f"{NAME} {KINDS[layer.tensors['weight'].dtype]}"}


def read(layer: Layer) -> Packed:
    from shared.quant.packings import fp8

    return fp8.pack(layer.load("weight")[0], None)


def quantize(weight: Tensor, *, kind: str = "e4m3fn") -> dict[str, Tensor]:
    """weight (any shape) rounded to float8 of this kind; numbers beyond its range become the largest it has."""
    from shared.quant.packings import fp8

    return {"weight": fp8.cast(weight, kind)}

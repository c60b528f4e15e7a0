"""Formats that can be written: what a recipe's names mean, and how files that use them call their layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shared.quant.recipe import KEPT

if TYPE_CHECKING:
    from torch import Tensor

# Which names of layers a file has: those of the model's own repository (ComfyUI), of diffusers, or nunchaku's.
Naming = Literal["official", "diffusers", "nunchaku"]

DEFAULT_RANK = 32
PLAIN = {KEPT: "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class Target:
    """A packed format. quantize(weight (rows, columns), matrices stacked in it, rank) -> a layer's tensors by suffix.

    columns: what the columns must be a multiple of. rows: the same. gguf: the GGUF type, "" for safetensors.
    """

    naming: Naming
    quantize: Callable[[Tensor, int, int], dict[str, Tensor]]
    suffixes: frozenset[str]
    rows: int = 1
    columns: int = 1
    gguf: str = ""
    has_rank: bool = False


def targets() -> Mapping[str, Target]:
    """Every packed format by its name in recipes."""
    from shared.quant.formats import comfy_int8, fp8_plain, fp8_scaled, gguf, mxfp8, nvfp4, quanto_int8, svdq

    def to_gguf(kind: str) -> Target:
        return Target(
            "official", lambda w, _parts, _rank: gguf.quantize(w, type=kind), gguf.SUFFIXES, columns=32, gguf=kind
        )

    return {
        "int8": Target("diffusers", lambda w, _parts, _rank: quanto_int8.quantize(w), quanto_int8.SUFFIXES),
        "int8_comfy": Target("official", lambda w, _parts, _rank: comfy_int8.quantize(w), comfy_int8.SUFFIXES),
        "fp8": Target("official", lambda w, _parts, _rank: fp8_plain.quantize(w), fp8_plain.SUFFIXES),
        "fp8_scaled": Target("official", lambda w, _parts, _rank: fp8_scaled.quantize(w), fp8_scaled.SUFFIXES),
        "mxfp8": Target("official", lambda w, _parts, _rank: mxfp8.quantize(w), mxfp8.SUFFIXES),
        "nvfp4": Target("official", lambda w, _parts, _rank: nvfp4.quantize(w), nvfp4.SUFFIXES),
        "svdq_int4": Target(
            "nunchaku", lambda w, parts, rank: svdq.quantize(w, kind="int4", rank=rank, parts=parts), svdq.SUFFIXES,
            rows=128, columns=128, has_rank=True,
        ),
        "svdq_fp4": Target(
            "nunchaku", lambda w, parts, rank: svdq.quantize(w, kind="fp4", rank=rank, parts=parts), svdq.SUFFIXES,
            rows=128, columns=128, has_rank=True,
        ),
        **{kind.lower(): to_gguf(kind) for kind in gguf.WRITABLE},
    }  # fmt: skip

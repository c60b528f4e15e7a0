"""Formats that can be written: what a recipe's names mean, and how files that use them call their layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from shared.quant.recipe import KEPT

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.inputs import Inputs
    from shared.quant.packings.svdq import Kind

# Which names of layers a file has: those of the model's own repository (ComfyUI), of diffusers, or nunchaku's.
Naming = Literal["official", "diffusers", "nunchaku"]

DEFAULT_RANK = 32
PLAIN = {KEPT: "BF16", "fp16": "F16", "fp32": "F32"}


class Quantize(Protocol):
    def __call__(
        self, weight: Tensor, parts: int, rank: int, *, inputs: Inputs | None = None, learned_rounding: bool = False
    ) -> dict[str, Tensor]:
        """A layer's tensors by suffix. weight: (rows, columns), `parts` matrices stacked. inputs: what it is fed with.

        learned_rounding: for formats that can, where there are inputs.
        """


@dataclass(frozen=True)
class Target:
    """A packed format.

    columns: what the columns must be a multiple of. rows: the same. gguf: the GGUF type, "" for safetensors.
    bytes: of a matrix (rows, columns), all tensors; None where nobody has to know before. ranked_bytes: the same of a
    format with a rank, (rows, columns, rank). file_tensors: what a file with such layers holds once.
    """

    naming: Naming
    quantize: Quantize
    suffixes: frozenset[str]
    rows: int = 1
    columns: int = 1
    gguf: str = ""
    has_rank: bool = False
    has_learned_rounding: bool = False
    bytes: Callable[[int, int], int] | None = None
    ranked_bytes: Callable[[int, int, int], int] | None = None
    file_tensors: Callable[[], dict[str, Tensor]] | None = None


def targets() -> Mapping[str, Target]:
    """Every packed format by its name in recipes."""
    from shared.quant.formats import comfy_int8, fp8_plain, fp8_scaled, gguf, mxfp8, nvfp4, quanto_int8, svdq

    def plain(quantize: Callable[[Tensor], dict[str, Tensor]]) -> Quantize:
        """Of a format that looks at nothing but the weight."""

        def of_weight(
            weight: Tensor, parts: int, rank: int, *, inputs: Inputs | None = None, learned_rounding: bool = False
        ) -> dict[str, Tensor]:
            return quantize(weight)

        return of_weight

    def to_official(module: Any, **options: Any) -> Target:
        return Target("official", plain(partial(module.quantize, **options)), module.SUFFIXES)

    def to_svdq(kind: Kind) -> Target:
        def quantize(
            weight: Tensor, parts: int, rank: int, *, inputs: Inputs | None = None, learned_rounding: bool = False
        ) -> dict[str, Tensor]:
            return svdq.quantize(
                weight, kind=kind, rank=rank, parts=parts, inputs=inputs, learned_rounding=learned_rounding
            )

        return Target(
            "nunchaku", quantize, svdq.SUFFIXES, rows=128, columns=128, has_rank=True, has_learned_rounding=True,
            ranked_bytes=partial(svdq.nbytes, kind),
        )  # fmt: skip

    def to_gguf(kind: str) -> Target:
        block, block_bytes = gguf.BLOCKS[kind]
        return Target(
            "official", plain(partial(gguf.quantize, type=kind)), gguf.SUFFIXES, columns=32, gguf=kind,
            bytes=lambda rows, columns: rows * columns // block * block_bytes,
        )  # fmt: skip

    return {
        "int8": Target("diffusers", plain(quanto_int8.quantize), quanto_int8.SUFFIXES),
        "int8_comfy": Target("official", plain(comfy_int8.quantize), comfy_int8.SUFFIXES, bytes=_int8_bytes),
        "int8_tensor": to_official(comfy_int8, per_row=False),
        "int8_convrot": replace(to_official(comfy_int8, rotation=None), columns=4),
        "fp8": to_official(fp8_plain),
        "fp8_e5m2": to_official(fp8_plain, kind="e5m2"),
        "fp8_scaled": to_official(fp8_scaled),
        "fp8_scaled_e5m2": to_official(fp8_scaled, kind="e5m2"),
        "fp8_scaled_rows": to_official(fp8_scaled, per_row=True),
        "fp8_scaled_blocks": replace(to_official(fp8_scaled, block=_FP8_BLOCK), rows=_FP8_BLOCK, columns=_FP8_BLOCK),
        "fp8_legacy": replace(to_official(fp8_scaled, legacy=True), file_tensors=fp8_scaled.file_marker),
        "mxfp8": Target("official", plain(mxfp8.quantize), mxfp8.SUFFIXES, bytes=_mxfp8_bytes),
        "mxfp8_e8m0": to_official(mxfp8, typed=True),
        "nvfp4": Target("official", plain(nvfp4.quantize), nvfp4.SUFFIXES, bytes=_nvfp4_bytes),
        "svdq_int4": to_svdq("int4"),
        "svdq_fp4": to_svdq("fp4"),
        **{kind.lower(): to_gguf(kind) for kind in gguf.WRITABLE},
    }


_FP8_BLOCK = 64  # rows and columns of a block with one scale, as in convert_to_quant

# Of a layer's marker in JSON, a hundred bytes or so.
_MARKER_BYTES = 100


def _int8_bytes(rows: int, columns: int) -> int:
    return rows * columns + 4 * rows + _MARKER_BYTES


def _mxfp8_bytes(rows: int, columns: int) -> int:
    rows, columns = _padded(rows, 32), _padded(columns, 32)
    return rows * columns + _padded(rows, 128) * _padded(columns // 32, 4) + _MARKER_BYTES


def _nvfp4_bytes(rows: int, columns: int) -> int:
    rows, columns = _padded(rows, 16), _padded(columns, 16)
    return rows * columns // 2 + _padded(rows, 128) * _padded(columns // 16, 4) + 4 + _MARKER_BYTES


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

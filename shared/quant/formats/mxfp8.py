"""MXFP8 as ComfyUI, comfy-kitchen and convert_to_quant write it.

    weight         F8_E4M3 (rows, columns)
    weight_scale   an exponent a block, swizzled: U8 from convert_to_quant, F8_E8M0 from comfy-kitchen, the same bytes

Told from scaled FP8, which has the same names, by the scale: that one is a float.
Sources: formats.md 4 to 4.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.quant.formats import Layer
from shared.quant.formats.comfy_quant import Size, block_marker, blocks_of, dtype_of, require, scales_of, size_of
from shared.quant.packing import Packed
from shared.quant.packings.mxfp8 import BIAS, BLOCK, NAN, Mxfp8, powers
from shared.quant.swizzle import padded_shape

if TYPE_CHECKING:
    from torch import Tensor

NAME = "MXFP8"
SUFFIXES = frozenset({"weight_scale", "comfy_quant", "input_scale", "pre_quant_scale"})

_SCALE_DTYPES = ("U8", "F8_E8M0")
_E4M3_MAX = 448.0


def claims(layer: Layer) -> bool:
    said = layer.marker.get("format")
    if said is not None:
        return bool(said == "mxfp8")
    return dtype_of(layer, "weight") == "F8_E4M3" and dtype_of(layer, "weight_scale") in _SCALE_DTYPES


def shape(layer: Layer) -> tuple[int, int]:
    size = _size(layer)
    return size.rows, size.columns


def describe(layer: Layer) -> dict[str, Any]:
    return {"format": "mxfp8", "group": BLOCK}


def read(layer: Layer) -> Packed:
    import torch

    size = _size(layer)
    values, stored = layer.load("weight", "weight_scale")
    tensors = {
        "codes": values.view(torch.uint8)[: size.rows],
        "exponents": stored.view(torch.uint8)[: padded_shape(size.rows, 1)[0]],
    }
    packing = Mxfp8(size.columns if size.columns < size.stored_columns else None, swizzled=True)
    return Packed(packing, (size.rows, size.columns), tensors)


def check(layer: Layer, packed: Packed) -> None:
    """Raises CheckpointError for exponents that no weight can have."""
    largest = int(scales_of(packed).max())
    if largest == NAN:
        raise layer.fail("weight_scale holds NaN.")
    if not largest and (packed.tensors["codes"] & 0x7F).any():
        raise layer.fail("weight_scale is zero throughout, though its weight is not.")


def quantize(weight: Tensor, *, typed: bool = False) -> dict[str, Tensor]:
    """The tensors of a file for `weight` (rows, columns), any float type.

    typed: exponents as F8_E8M0, which they are, and not as U8, which more readers know (mmgp's knows no F8_E8M0).
    A block's exponent is the least whose power of two brings its largest number down to 448, the largest E4M3. Raises
    UserError for NaN, infinity or anything but a matrix.
    Source: comfy-kitchen 0.2.40 backends/eager/quantization.py; the same bytes as its quantize_mxfp8.
    """
    import torch

    from shared.quant.swizzle import swizzle

    blocks = blocks_of(weight, BLOCK)
    largest = blocks.abs().amax(dim=2)
    # frexp: x = fraction * 2 ** exponent with fraction in [0.5, 1), so log2(x) rounds up to the exponent, or to one
    # less when x is a power of two. Exact, which a rounded logarithm is not.
    fraction, exponent = torch.frexp(largest / _E4M3_MAX)
    exponents = (exponent - (fraction == 0.5).int() + BIAS).clamp(1, NAN - 1)  # byte 0 is for blocks of zeros
    exponents = torch.where(largest > 0, exponents, 0).to(torch.uint8)
    scales = powers(exponents).unsqueeze(2)
    values = torch.where(scales > 0, blocks / scales, 0.0).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return {
        "weight": values.flatten(1),
        "weight_scale": swizzle(exponents).view(torch.float8_e8m0fnu if typed else torch.uint8),
        "comfy_quant": block_marker("mxfp8", BLOCK, weight),
    }


def _size(layer: Layer) -> Size:
    stored = require(layer, "weight", ("F8_E4M3",), dimensions=2)
    require(layer, "weight_scale", _SCALE_DTYPES, dimensions=2)
    return size_of(layer, stored.shape[1], BLOCK)

"""int8 as ComfyUI and convert_to_quant save it.

    L.weight         I8   (out, in)
    L.weight_scale   F32  ()                  int8_tensorwise, one scale
                          (out,), (out, 1)    int8_tensorwise, per row
                          (out/g, in/g)       int8_blockwise
    L.comfy_quant    U8   JSON, e.g. {"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}
    L.input_scale    F32  ()                  for quantized activations; no part of the weight

The JSON may stand in the header instead. Without either, I8 with a scale is read as not rotated. convert_to_quant's
old spelling has `scale_weight` and `scale_input`. ConvRot's arithmetic is explained in packings/int8.py.
Sources: formats.md 4, 4.4; comfy-kitchen 0.2.40; convert_to_quant 1.3.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.quant.formats import Layer, marker_tensor
from shared.quant.formats.scales import check_scale, matrix_of, read_scale

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.packing import Packed

NAME = "ComfyUI int8"
SUFFIXES = frozenset({"weight_scale", "scale_weight", "input_scale", "scale_input", "comfy_quant"})
FORMATS = ("int8_tensorwise", "int8_blockwise")

# What ConvRot files mean when they give no group, and the largest that the writer takes.
ROTATION = 256


def claims(layer: Layer) -> bool:
    if layer.marker:
        return layer.marker.get("format") in FORMATS
    weight = layer.tensors.get("weight")
    return weight is not None and weight.dtype == "I8" and _scale_suffix(layer) in layer.tensors


def shape(layer: Layer) -> tuple[int, int]:
    weight = layer.tensors.get("weight")
    if weight is None:
        raise layer.fail("it is marked as int8 but has no weight.")
    if weight.dtype != "I8" or len(weight.shape) != 2:
        raise layer.fail(f"its int8 weight is {weight.dtype} {list(weight.shape)}, expected I8 with two dimensions.")
    return weight.shape[0], weight.shape[1]


def describe(layer: Layer) -> dict[str, Any]:
    rotation = _rotation(layer)
    return {"format": f"{NAME} ConvRot", "group": rotation} if rotation else {"format": NAME}


def read(layer: Layer) -> Packed:
    from shared.quant.packings import int8

    _, columns = shape(layer)
    rotation = _rotation(layer)
    if rotation and not int8.is_rotation(rotation, columns):
        raise layer.fail(f"ConvRot groups of {rotation} columns are impossible for {columns} columns.")
    codes = layer.load("weight")[0]
    scale = read_scale(layer, _scale_suffix(layer), codes)
    return int8.pack(codes, scale, rotation)


def check(layer: Layer, packed: Packed) -> None:
    """Raises CheckpointError for scales that no weight can have."""
    check_scale(layer, _scale_suffix(layer), packed)


def quantize(weight: Tensor, *, per_row: bool = True, rotation: int | None = 0) -> dict[str, Tensor]:
    """weight (out, in) as this format's tensors, marker included.

    per_row: a scale for each row, else one for all. rotation: ConvRot's group, 0 for none, None for the largest power
    of four up to 256 that divides the columns. Errors: see int8.quantize(). Raises ValueError when the columns cannot
    be rotated, UserError when the weight is no matrix of finite numbers.
    """
    from shared.quant.packings import int8

    weight = matrix_of(weight)
    columns = weight.shape[1]
    if rotation is None:
        rotation = next((size for size in (256, 64, 16, 4) if columns % size == 0), 0)
        if not rotation:
            raise ValueError(f"{columns} columns are not a multiple of 4, so ConvRot cannot rotate them")
    if rotation and not (per_row and int8.is_rotation(rotation, columns)):
        raise ValueError(f"ConvRot needs a scale per row and a power of four that divides {columns}, not {rotation}")
    codes, scale = int8.quantize(int8.rotate(weight, rotation) if rotation else weight, per_row=per_row)
    rotated = {"convrot": True, "convrot_groupsize": rotation} if rotation else {}
    return {
        "weight": codes,
        "weight_scale": scale,
        "comfy_quant": marker_tensor({"format": FORMATS[0], **({"per_row": True} if per_row else {}), **rotated}),
    }


def _scale_suffix(layer: Layer) -> str:
    return "scale_weight" if "scale_weight" in layer.tensors else "weight_scale"


def _rotation(layer: Layer) -> int:
    if not layer.marker.get("convrot"):
        return 0
    size = layer.marker.get("convrot_groupsize", ROTATION)
    if not isinstance(size, int):
        raise layer.fail(f"its marker's convrot_groupsize is {size!r}, not a number.")
    return size

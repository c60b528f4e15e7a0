"""NVFP4 as ComfyUI, comfy-kitchen and convert_to_quant write it, and as LightX2V does.

    tensor                ComfyUI                              LightX2V
    weight                U8 (rows, columns / 2)               the same bytes with the halves swapped
    weight_scale          F8_E4M3, swizzled                    the same
    scale above           weight_scale_2                       1 / weight_global_scale, or alpha * input_global_scale
    for activations       input_scale                          input_absmax, input_global_scale

What is there for activations only says how these may be quantized: it is no part of the weight and is not used.
Sources: formats.md 4.1 to 4.3; LightX2V tools/convert/quant/quant.py and common/ops/mm/mm_weight.py.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from shared.quant.formats import Layer
from shared.quant.formats.comfy_quant import Size, block_marker, blocks_of, dtype_of, require, scales_of, size_of
from shared.quant.packing import Packed
from shared.quant.packings.nvfp4 import BLOCK, Nvfp4
from shared.quant.swizzle import padded_shape

if TYPE_CHECKING:
    from torch import Tensor

NAME = "NVFP4"
SUFFIXES = frozenset(
    {"weight_scale", "weight_scale_2", "comfy_quant", "input_scale", "pre_quant_scale"}
    | {"weight_global_scale", "alpha", "input_global_scale", "input_absmax"}
)

# E4M3 as bytes: from here on NaN and the negative numbers, neither of which a scale may be.
_NO_SCALE = 0x7F
_E4M3_MAX = 448.0


def claims(layer: Layer) -> bool:
    said = layer.marker.get("format")
    if said is not None:
        return bool(said == "nvfp4")
    return dtype_of(layer, "weight") == "U8" and dtype_of(layer, "weight_scale") == "F8_E4M3"


def shape(layer: Layer) -> tuple[int, int]:
    size = _size(layer)
    return size.rows, size.columns


def describe(layer: Layer) -> dict[str, Any]:
    return {"format": "nvfp4", "group": BLOCK, "spelling": "LightX2V" if _is_lightx2v(layer) else "ComfyUI"}


def read(layer: Layer) -> Packed:
    import torch

    size = _size(layer)
    codes, stored = layer.load("weight", "weight_scale")
    tensors = {
        "codes": codes[: size.rows],
        "block_scales": stored.view(torch.uint8)[: padded_shape(size.rows, 1)[0]],
        "tensor_scale": torch.full((size.rows, 1), _tensor_scale(layer), dtype=torch.float32),
    }
    columns = size.columns if size.columns < size.stored_columns else None
    packing = Nvfp4(columns, swizzled=True, low_first=_is_lightx2v(layer))
    return Packed(packing, (size.rows, size.columns), tensors)


def check(layer: Layer, packed: Packed) -> None:
    """Raises CheckpointError for block scales that no weight can have."""
    largest = int(scales_of(packed).max())
    if largest >= _NO_SCALE:
        raise layer.fail("weight_scale holds NaN or negative numbers.")
    if not largest and (packed.tensors["codes"] & 0x77).any():
        raise layer.fail("weight_scale is zero throughout, though its weight is not.")


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """The tensors of a file in ComfyUI's spelling for `weight` (rows, columns), any float type.

    The tensor scale is amax / (448 * 6), so that the largest block scale is the largest E4M3; a block's scale is its
    own amax / 6 over the tensor scale, rounded to E4M3. Raises UserError for NaN, infinity or anything but a matrix.
    Source: comfy-kitchen 0.2.40 backends/eager/quantization.py; the same bytes as its quantize_nvfp4.
    """
    import torch

    from shared.quant import e2m1
    from shared.quant.swizzle import swizzle

    blocks = blocks_of(weight, BLOCK)
    largest = blocks.abs().amax(dim=2)
    tensor_scale = largest.amax() / (_E4M3_MAX * e2m1.MAX)
    if tensor_scale == 0:  # zeros need no scale, but readers divide by it or refuse it
        tensor_scale = torch.ones(())
    block_scales = (largest / e2m1.MAX / tensor_scale).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn)
    scales = (tensor_scale * block_scales.float()).unsqueeze(2)
    codes = e2m1.encode(torch.where(scales > 0, blocks / scales, 0.0))
    return {
        "weight": e2m1.pack(codes.flatten(1)),
        "weight_scale": swizzle(block_scales),
        "weight_scale_2": tensor_scale,
        "comfy_quant": block_marker("nvfp4", BLOCK, weight),
    }


def _size(layer: Layer) -> Size:
    stored = require(layer, "weight", ("U8",), dimensions=2)
    require(layer, "weight_scale", ("F8_E4M3",), dimensions=2)
    return size_of(layer, stored.shape[1] * 2, BLOCK)


def _is_lightx2v(layer: Layer) -> bool:
    return "weight_scale_2" not in layer.tensors and bool({"weight_global_scale", "alpha"} & layer.tensors.keys())


def _tensor_scale(layer: Layer) -> float:
    if not _is_lightx2v(layer):
        return _scalar(layer, "weight_scale_2")
    if "weight_global_scale" in layer.tensors:
        return 1 / _scalar(layer, "weight_global_scale")
    return _scalar(layer, "alpha") * _scalar(layer, "input_global_scale")


def _scalar(layer: Layer, suffix: str) -> float:
    """A positive number; tools write it as [] or as [1]."""
    info = require(layer, suffix, ("F32",))
    if info.numel != 1:
        raise layer.fail(f"{suffix} is {list(info.shape)}, expected one number.")
    # Read, not mapped: mapping fetches the megabytes around it, too, from a file that is not in memory yet.
    value: float = struct.unpack("<f", layer.checkpoint.read_bytes(info.name))[0]
    if not 0 < value < float("inf"):
        raise layer.fail(f"{suffix} is {value}, expected a positive number.")
    return value

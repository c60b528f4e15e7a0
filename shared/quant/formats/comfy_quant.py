"""What ComfyUI's block formats (NVFP4, MXFP8) have in common: a marker in JSON, swizzled scales, padding to blocks.

A layer that convert_to_quant or comfy-kitchen wrote:

    weight         codes, rows and columns padded with zeros to multiples of the block (16 or 32)
    weight_scale   one byte a block, in the tensor cores' order and padded (shared/quant/swizzle.py)
    comfy_quant    uint8, the bytes of {"format": "nvfp4", "group_size": 16, "orig_shape": [64, 250], ...}

Only "format" is always there, and the marker as a whole may be in the header instead or missing altogether.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from shared.quant.checkpoint import TensorInfo
from shared.quant.errors import UserError
from shared.quant.formats import Layer, marker_tensor
from shared.quant.packings.block_scaled import BlockScaled
from shared.quant.swizzle import padded_shape

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.packing import Packed


class Size(NamedTuple):
    """Of a layer's matrix, and of what the file stores of it."""

    rows: int
    columns: int
    stored_rows: int
    stored_columns: int


def block_marker(name: str, group: int, weight: Tensor) -> Tensor:
    """The `comfy_quant` tensor of a layer quantized from `weight`."""
    original = {"orig_dtype": str(weight.dtype), "orig_shape": list(weight.shape)}
    return marker_tensor({"format": name, "group_size": group, **original})


def dtype_of(layer: Layer, suffix: str) -> str | None:
    info = layer.tensors.get(suffix)
    return info.dtype if info is not None else None


def require(layer: Layer, suffix: str, dtypes: Sequence[str], dimensions: int | None = None) -> TensorInfo:
    """The header's entry of a tensor that has to be there. Raises CheckpointError for another type or none."""
    info = layer.tensors.get(suffix)
    if info is None:
        raise layer.fail(f"its {suffix} is missing.", "The file is truncated; download it again.")
    if info.dtype not in dtypes:
        raise layer.fail(f"{suffix} is {info.dtype}, expected {' or '.join(dtypes)}.")
    if dimensions is not None and len(info.shape) != dimensions:
        raise layer.fail(f"{suffix} is {list(info.shape)}, expected {dimensions} dimensions.")
    return info


def size_of(layer: Layer, stored_columns: int, block: int) -> Size:
    """The layer's size, its stored columns, scales' shape and marker checked against each other.

    Raises CheckpointError naming what does not fit.
    """
    stored_rows = layer.tensors["weight"].shape[0]
    if "pre_quant_scale" in layer.tensors:
        raise layer.fail(
            "it has a pre_quant_scale (AWQ), which this version does not apply.",
            "Use a file made without AWQ calibration.",
        )
    group = layer.marker.get("group_size", block)
    if group != block:
        raise layer.fail(f"its marker says group_size {group!r}, the format has blocks of {block}.")
    if not stored_rows or not stored_columns or stored_columns % block:
        raise layer.fail(f"its weight has {stored_rows} rows of {stored_columns} numbers, no whole blocks of {block}.")
    scale = layer.tensors["weight_scale"].shape
    expected = padded_shape(stored_rows, stored_columns // block)
    if scale != expected:
        raise layer.fail(
            f"weight_scale is {list(scale)}, expected {list(expected)} for {stored_rows} x {stored_columns} numbers."
        )
    match layer.marker.get("orig_shape"):
        case None:
            rows, columns = stored_rows, stored_columns
        case [int(rows), int(columns)] if 0 <= stored_rows - rows < block and 0 <= stored_columns - columns < block:
            pass
        case other:
            raise layer.fail(
                f"its marker says orig_shape {other!r}, it holds {stored_rows} x {stored_columns} numbers."
            )
    return Size(rows, columns, stored_rows, stored_columns)


def scales_of(packed: Packed) -> Tensor:
    """The scales of a layer's blocks and no padding, in any order; as they lie where there is no padding."""
    packing = packed.packing
    assert isinstance(packing, BlockScaled)
    stored = packed.tensors[packing.scales]
    rows, width = packed.tensors["codes"].shape
    if stored.shape == (rows, width // packing.block_bytes):
        return stored
    return packing.natural(packed.tensors)[packing.scales]


def blocks_of(weight: Tensor, block: int) -> Tensor:
    """`weight` in float32, padded with zeros to multiples of `block` both ways: (rows, columns / block, block).

    Raises UserError when it is no matrix of finite numbers.
    """
    from torch.nn import functional

    if weight.ndim != 2 or not weight.numel():
        raise UserError(f"A weight of shape {list(weight.shape)} cannot be quantized: it is no matrix.")
    if not weight.isfinite().all():
        raise UserError("A weight that holds NaN or infinity cannot be quantized.", "Its file is damaged.")
    rows, columns = weight.shape
    padded = functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    return padded.reshape(padded.shape[0], -1, block)

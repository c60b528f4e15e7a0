"""FP8 with scales, in every spelling of ComfyUI, its converters and ours.

    L.weight         F8_E4M3 or F8_E5M2 (out, in)
    L.weight_scale   F32  ()                  float8_e4m3fn, float8_e5m2: W = weight * scale
                          (out,), (out, 1)    float8_e4m3fn_rowwise
                          (out/g, in/g)       float8_e4m3fn_blockwise
                          (out, in/g, 1)      float8_e4m3fn_block3d, also under the plain name
    L.input_scale    F32  ()                  for quantized activations; no part of the weight, never multiplied in
    L.comfy_quant    U8   JSON, {"format": "float8_e4m3fn"}; it may stand in the header instead, or be absent

The older spelling has `scale_weight` and `scale_input`, and one tensor `scaled_fp8` for the whole file, behind the
model's prefix if it has one. Its size tells ComfyUI how to multiply (two elements: in full precision); it holds no
numbers. In such files a float8 weight without a scale is a bare cast (fp8_plain.py).
MXFP8 keeps float8 weights too, but its scales are exponents (U8 or F8_E8M0). Sources: formats.md 4, 4.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.quant.formats import Layer, marker_tensor
from shared.quant.formats.scales import SCALE_DTYPES, check_scale, matrix_of, read_scale

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.packing import Packed

NAME = "FP8 scaled"
SUFFIXES = frozenset({"weight_scale", "scale_weight", "input_scale", "scale_input", "comfy_quant"})
FILE_TENSORS = frozenset({"scaled_fp8"})
KINDS = {"F8_E4M3": "e4m3fn", "F8_E5M2": "e5m2"}
FORMATS = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fn_rowwise",
    "float8_e4m3fn_blockwise",
    "float8_e4m3fn_block3d",
)


def claims(layer: Layer) -> bool:
    if layer.marker:
        return layer.marker.get("format") in FORMATS
    weight, scale = layer.tensors.get("weight"), layer.tensors.get(_scale_suffix(layer))
    return weight is not None and weight.dtype in KINDS and scale is not None and scale.dtype in SCALE_DTYPES


def shape(layer: Layer) -> tuple[int, int]:
    weight = layer.tensors.get("weight")
    if weight is None:
        raise layer.fail("it is marked as FP8 but has no weight.")
    if weight.dtype not in KINDS or len(weight.shape) != 2:
        raise layer.fail(
            f"its FP8 weight is {weight.dtype} {list(weight.shape)}, expected F8_E4M3 or F8_E5M2 with two dimensions."
        )
    return weight.shape[0], weight.shape[1]


def describe(layer: Layer) -> dict[str, Any]:
    shape(layer)
    return {"format": f"{NAME} {KINDS[layer.tensors['weight'].dtype]}"}


def read(layer: Layer) -> Packed:
    from shared.quant.packings import fp8

    shape(layer)
    if layer.marker.get("convrot"):
        raise layer.fail(
            "its marker asks for a rotated FP8 weight, which no known program reads.", "Use another file of the model."
        )
    codes = layer.load("weight")[0]
    return fp8.pack(codes, read_scale(layer, _scale_suffix(layer), codes))


def check(layer: Layer, packed: Packed) -> None:
    """Raises CheckpointError for scales that no weight can have."""
    check_scale(layer, _scale_suffix(layer), packed)


def quantize(
    weight: Tensor, *, kind: str = "e4m3fn", per_row: bool = False, block: int = 0, legacy: bool = False
) -> dict[str, Tensor]:
    """weight (out, in) as this format's tensors, marker included.

    kind: "e4m3fn" or "e5m2". Scales: one, or per_row, or for square blocks of `block`; ComfyUI itself reads only one.
    legacy: the older spelling, without a marker: the file then needs file_marker() too. Relative error on Gaussian
    weights: 0.027 (e4m3fn), 0.053 (e5m2). Raises ValueError for blocks that do not divide the weight and for scales
    that no marker names, UserError when the weight is no matrix of finite numbers.
    """
    from shared.quant.packings import fp8

    weight = matrix_of(weight)
    rows, columns = weight.shape
    if kind != "e4m3fn" and (per_row or block):
        raise ValueError(f"no file format has {kind} with scales per row or block")
    marker: dict[str, Any] = {"format": f"float8_{kind}"}
    if block:
        if rows % block or columns % block:
            raise ValueError(f"blocks of {block} do not divide a weight of {[rows, columns]}")
        blocks = weight.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # (rows/b, b, columns/b, b)
        grid = fp8.scale_for(blocks, kind, dim=(1, 3))
        codes = fp8.cast(blocks / grid, kind).reshape(rows, columns)
        scale = grid[:, 0, :, 0].contiguous()
        marker = {"format": "float8_e4m3fn_blockwise", "group_size": block}
    elif per_row:
        scale = fp8.scale_for(weight, kind, dim=(1,))
        codes = fp8.cast(weight / scale, kind)
        marker = {"format": "float8_e4m3fn_rowwise"}
    else:
        scale = fp8.scale_for(weight, kind)
        codes = fp8.cast(weight / scale, kind)
    if legacy:
        return {"weight": codes, "scale_weight": scale}
    return {"weight": codes, "weight_scale": scale, "comfy_quant": marker_tensor(marker)}


def file_marker(kind: str = "e4m3fn") -> dict[str, Tensor]:
    """The tensor that a file of legacy spelling holds once, after the model's prefix; empty: FP8 products allowed."""
    import torch

    from shared.quant.packings import fp8

    return {"scaled_fp8": torch.empty(0, dtype=fp8.DTYPES[kind])}


def _scale_suffix(layer: Layer) -> str:
    return "scale_weight" if "scale_weight" in layer.tensors else "weight_scale"

"""SVDQuant files of nunchaku: tensors laid out for the tensor cores of a GPU, read as they lie.

    qweight             I8       (N, K/2)   4-bit codes, in tiles
    wscales             BF16     (K/64, N)  int4: a scale for 64 columns, in tiles
                     or F8_E4M3  (K/16, N)  fp4: a scale for 16 columns, in tiles; this type tells the two kinds apart
    smooth_factor       BF16     (K,)       in tiles
    smooth_factor_orig  BF16     (K,)       used by nobody, but nunchaku's loader insists on it
    proj_down           BF16     (K, R)     low-rank branch, in tiles
    proj_up             BF16     (N, R)     low-rank branch, in tiles
    wtscale             a float  () or (1,) fp4, may be absent: a scale of the whole matrix
    wcscales            BF16     (N,)       fp4, may be absent: a scale for each row, in tiles; for stacked matrices

Modules (models/z_image/keys.py maps them): attention.to_qkv (q, k, v), attention.to_out.0, feed_forward.net.0.proj
(w3's rows first, then w1's), feed_forward.net.2. What packings/svdq.py says of the numbers is not repeated here.

Tiles are explained in shared/quant/svdq_tiling.py; for them N and K must be multiples of 128, R of 16. Sources:
formats.md 3; nunchaku's packer (nunchaku/lora/flux/packer.py), models/linear.py, merge_safetensors.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shared.quant.errors import UserError
from shared.quant.formats import Layer
from shared.quant.formats.scales import all_finite
from shared.quant.svdq_tiling import SCALES, unpack_scales

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.inputs import Inputs
    from shared.quant.packing import Packed
    from shared.quant.packings.svdq import Kind

NAME = "SVDQ"
SUFFIXES = frozenset(
    ("qweight", "wscales", "smooth_factor", "smooth_factor_orig", "proj_down", "proj_up", "wtscale", "wcscales")
)

_REQUIRED = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up")
_HALF = ("BF16", "F16")
# What is looked through: the file's names, and what they are called in packings/svdq.py and to people.
_NUMBERS = {
    "wscales": "scales", "row_scale": "row_scale", "smooth_factor": "smooth", "proj_down": "down", "proj_up": "up",
}  # fmt: skip
_E4M3_MAGNITUDE = 0x7F  # all of these bits set: NaN
_GROUP: dict[Kind, int] = {"int4": 64, "fp4": 16}
_TILE = 128  # rows and columns of codes
_RANK_TILE = 16


def claims(layer: Layer) -> bool:
    # comfy-kitchen uses some of these names for untiled tensors, with a marker.
    return "qweight" in layer.tensors and not layer.marker and bool(layer.tensors.keys() & {"proj_down", "proj_up"})


def shape(layer: Layer) -> tuple[int, int]:
    info = layer.tensors["qweight"]
    if info.dtype != "I8" or len(info.shape) != 2:
        raise layer.fail(f"qweight is {info.dtype} {list(info.shape)}, expected I8 of two axes.")
    return info.shape[0], 2 * info.shape[1]


def describe(layer: Layer) -> dict[str, Any]:
    kind, _, rank = _check_header(layer)
    return {"format": f"{NAME} {kind}", "rank": rank, "group": _GROUP[kind]}


def read(layer: Layer) -> Packed:
    import torch

    from shared.quant.packing import Packed
    from shared.quant.packings.svdq import Svdq

    kind, (rows, columns), _rank = _check_header(layer)
    packed = dict(zip(_REQUIRED, layer.load(*_REQUIRED), strict=True))
    packed["wscales"] = packed["wscales"].view(rows, -1)
    if kind == "fp4" or "wcscales" in layer.tensors or "wtscale" in layer.tensors:
        row_scale = torch.ones(rows, 1)
        if "wcscales" in layer.tensors:
            row_scale *= unpack_scales(layer.load("wcscales")[0], rows, 1).float()
        if "wtscale" in layer.tensors:
            row_scale *= layer.load("wtscale")[0].float().reshape(1, 1)
        packed["row_scale"] = row_scale
    return Packed(Svdq(kind), (rows, columns), packed)


def check(layer: Layer, packed: Packed) -> None:
    """Raises CheckpointError for NaN, infinity, and zeros that numbers are multiplied or divided by."""
    wrong = "The file was damaged or written wrongly; download it again, or from elsewhere."
    found = {ours: packed.tensors[name] for name, ours in _NUMBERS.items() if name in packed.tensors}
    for ours, tensor in found.items():
        if not _are_finite(tensor):
            raise layer.fail(f"its {ours} holds NaN or infinity.", wrong)
    for ours in ("smooth", "row_scale"):
        if ours in found and not found[ours].all():
            raise layer.fail(f"its {ours} holds zeros.", wrong)
    if not _hold_zeros(found["scales"]):
        return
    from shared.quant.packings import svdq_tiles

    # A group of zeros may have the scale 0: which codes are a group's shows when both are in order.
    natural = svdq_tiles.in_order(packed.tensors)
    unscaled = natural["scales"].float() == 0
    # fp4 has two zeros, 0 and -0.
    magnitude = 0x77 if _kind(layer) == "fp4" else 0xFF
    used = (natural["codes"] & magnitude).unflatten(1, (unscaled.shape[1], -1)).any(dim=2)
    lost = int((unscaled & used).sum())
    if lost:
        raise layer.fail(f"{lost} of {unscaled.numel()} groups hold numbers but the scale 0.", wrong)


def _are_finite(numbers: Tensor) -> bool:
    import torch

    if numbers.dtype == torch.float8_e4m3fn:  # no infinity, and NaN in two spellings
        return not bool(((numbers.view(torch.uint8) & _E4M3_MAGNITUDE) == _E4M3_MAGNITUDE).any())
    return all_finite(numbers)


def _hold_zeros(scales: Tensor) -> bool:
    import torch

    if scales.dtype == torch.float8_e4m3fn:
        return not bool((scales.view(torch.uint8) & _E4M3_MAGNITUDE).all())
    return not bool(scales.all())


def _kind(layer: Layer) -> Kind:
    """Which 4-bit numbers the codes are: what nunchaku goes by is the GPU, so only the scales' type tells."""
    if "wscales" not in layer.tensors:
        raise layer.fail("it has 4-bit codes but no wscales.", "The file is truncated; download it again.")
    dtype = layer.tensors["wscales"].dtype
    if dtype == "F8_E4M3":
        return "fp4"
    if dtype in _HALF:
        return "int4"
    raise layer.fail(f"wscales is {dtype}, expected BF16 or F16 (int4) or F8_E4M3 (fp4).")


def _check_header(layer: Layer) -> tuple[Kind, tuple[int, int], int]:
    """Kind, (rows, columns) and rank, once types and shapes of all tensors agree."""
    kind = _kind(layer)
    missing = [suffix for suffix in _REQUIRED if suffix not in layer.tensors]
    if missing:
        raise layer.fail(f"has no {', '.join(missing)}.", "The file is truncated; download it again.")
    rows, columns = shape(layer)
    if rows % _TILE or columns % _TILE or not rows or not columns:
        raise layer.fail(f"its weight is {rows} x {columns}, but nunchaku's tiles are {_TILE} x {_TILE}.")
    down = layer.tensors["proj_down"].shape
    rank = down[-1] if len(down) == 2 else 0
    if not rank or rank % _RANK_TILE:
        raise layer.fail(f"proj_down is {list(down)}, expected [{columns}, rank], the rank a multiple of {_RANK_TILE}.")
    expected: dict[str, tuple[int, ...]] = {
        "wscales": (columns // _GROUP[kind], rows),
        "smooth_factor": (columns,),
        "proj_down": (columns, rank),
        "proj_up": (rows, rank),
        "wcscales": (rows,),
    }
    for suffix, wanted in expected.items():
        info = layer.tensors.get(suffix)
        if info is None:
            continue
        if info.shape != wanted:
            of = f"{kind} of {rows} x {columns}, rank {rank}"
            raise layer.fail(f"{suffix} is {list(info.shape)}, expected {list(wanted)} for {of}.")
        if suffix != "wscales" and info.dtype not in _HALF:
            raise layer.fail(f"{suffix} is {info.dtype}, expected BF16 or F16.")
    scalar = layer.tensors.get("wtscale")
    if scalar is not None and (scalar.numel != 1 or scalar.dtype not in (*_HALF, "F32")):
        raise layer.fail(f"wtscale is {scalar.dtype} {list(scalar.shape)}, expected one BF16, F16 or F32.")
    if "bias" in layer.tensors:
        # It would be in tiles too. No Z-Image layer that nunchaku packs has one.
        raise layer.fail("has a bias, which this version does not read beside packed weights.", "Use another file.")
    return kind, (rows, columns), rank


def nbytes(kind: Kind, rows: int, columns: int, rank: int) -> int:
    """Bytes of all tensors of a matrix; in fp4 some may be less, a scale for each row being the most there is."""
    group = _GROUP[kind]
    rank = -(-rank // _RANK_TILE) * _RANK_TILE
    scales = rows * columns // group * (2 if kind == "int4" else 1)
    vectors = 2 * 2 * columns + (0 if kind == "int4" else 2 * rows + 4)
    return rows * columns // 2 + scales + vectors + 2 * rank * (rows + columns)


def quantize(
    weight: Tensor,
    *,
    kind: Kind = "int4",
    rank: int = 32,
    smooth: Tensor | None = None,
    iterations: int = 5,
    parts: int = 1,
    inputs: Inputs | None = None,
    learned_rounding: bool = False,
) -> dict[str, Tensor]:
    """A file's tensors, by suffix, for `weight` (rows, columns): contiguous, on the weight's device.

    rank: rounded up to a multiple of 16. smooth: (columns,), positive; activations will be divided by it, so it is
    large where they are. iterations, inputs, learned_rounding: see svdquant.py. parts: matrices stacked in `weight`,
    each with its own scale in fp4 (3 for to_qkv). Raises UserError for sizes that do not fit nunchaku's tiles, and for
    NaN.
    """
    from shared.quant.packing import Packed
    from shared.quant.packings.svdq import Svdq
    from shared.quant.svdquant import fit

    rows, columns = weight.shape
    if rows % _TILE or columns % _TILE:
        raise UserError(
            f"A weight of {rows} x {columns} cannot become SVDQuant, whose tiles are {_TILE} x {_TILE}.",
            "Keep this layer in bf16.",
        )
    if not weight.isfinite().all():
        raise UserError("The weight to be quantized holds NaN or infinity.", "Download the source file again.")
    if smooth is not None and (smooth.shape != (columns,) or not (smooth.isfinite() & (smooth > 0)).all()):
        raise UserError(f"Smoothing of a weight of {columns} columns takes that many positive numbers.")
    tensors = fit(
        weight,
        kind=kind,
        rank=_padded(rank),
        group=_GROUP[kind],
        smooth=smooth,
        iterations=iterations,
        parts=parts,
        inputs=inputs,
        learned_rounding=learned_rounding,
    )
    return pack(Packed(Svdq(kind), (rows, columns), tensors))


def pack(packed: Packed) -> dict[str, Tensor]:
    """The file's tensors, by suffix: the inverse of read()."""
    from shared.quant.packings import svdq_tiles

    rows = packed.shape[0]
    tiles = svdq_tiles.for_the_engine(packed.tensors, has_row_scales=False)
    smooth = tiles["smooth_factor"]
    result = tiles | {"wscales": tiles["wscales"].view(-1, rows), "smooth_factor_orig": smooth.clone()}
    result.pop("wcscales", None)
    row_scale = svdq_tiles.row_scale(packed.tensors).to(smooth.dtype)
    if (row_scale == row_scale[0]).all():
        if row_scale[0] != 1:
            result["wtscale"] = row_scale[0, 0].clone()
    else:
        result["wcscales"] = SCALES.to_file(row_scale)
    return result


def header(config: Mapping[str, Any], *, kind: Kind, rank: int, skip_refiners: bool = False) -> dict[str, str]:
    """The `__metadata__` that nunchaku's loader wants: config of the diffusers model, kind, rank.

    skip_refiners: whether the refiners' layers are plain, named as nunchaku's loader expects them: attention.to_q,
    to_k, to_v, to_out.0 and, all the same, feed_forward.net.0.proj (w3's rows first) and net.2. The key `comfy_config`
    of published files is left out: nunchaku's loader does not read it.
    Source: nunchaku's merge_safetensors.py and models/transformers/transformer_zimage.py.
    """
    fp4 = kind == "fp4"
    numbers = {"dtype": "fp4_e2m1_all" if fp4 else "int4", "group_size": _GROUP[kind]}
    quantization = {
        "method": "svdquant",
        "weight": {**numbers, "scale_dtype": [None, "fp8_e4m3_nan"] if fp4 else None},
        "activation": {**numbers, "scale_dtype": "fp8_e4m3_nan" if fp4 else None},
        "rank": _padded(rank),
        "skip_refiners": skip_refiners,
    }
    return {
        "model_class": "NunchakuZImageTransformer2DModel",
        "config": json.dumps(dict(config)),
        "quantization_config": json.dumps(quantization),
    }


def _padded(rank: int) -> int:
    return -(-rank // _RANK_TILE) * _RANK_TILE

"""Scales of 8-bit weights: every shape that files give them, brought into one and checked.

    in a file                  for                     here
    (), (1,), (1, 1)           the whole matrix        (1, 1)
    (rows,), (rows, 1)         each row                (rows, 1)
    (rows / a, columns / b)    blocks of a x b         the same; (rows, 1) where b is all columns
    (rows, columns / b, 1)     b columns of a row      (rows, columns / b)

A scalar may come back as one number in a row: mmgp's reader turns () into (1,).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.quant.errors import UserError
from shared.quant.formats import Layer
from shared.quant.packings.scale_rows import spread

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.packing import Packed

SCALE_DTYPES = ("F32", "BF16", "F16")


def read_scale(layer: Layer, suffix: str, codes: Tensor) -> Tensor:
    """The scales in `layer.tensors[suffix]` for `codes` (rows, columns): float32, of a shape as above.

    Raises CheckpointError when they are absent, or of a wrong type or shape.
    """
    info = layer.tensors.get(suffix)
    if info is None:
        raise layer.fail(f"its weight is packed but has no {suffix}.", "The file is truncated; download it again.")
    if info.dtype not in SCALE_DTYPES:
        raise layer.fail(f"{suffix} is {info.dtype}, expected one of {', '.join(SCALE_DTYPES)}.")
    rows, columns = codes.shape
    scale = layer.load(suffix)[0].float()
    if scale.ndim == 3 and scale.shape[2] == 1:
        scale = scale.squeeze(2)
    elif scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif scale.shape == (rows,):
        scale = scale.unsqueeze(1)
    if scale.ndim != 2 or 0 in scale.shape or rows % scale.shape[0] or columns % scale.shape[1]:
        raise layer.fail(f"{suffix} is {list(info.shape)}, which fits no blocks of a weight of {[rows, columns]}.")
    return spread(scale, rows) if scale.shape[1] == 1 else scale


def check_scale(layer: Layer, suffix: str, packed: Packed) -> None:
    """Raises CheckpointError for scales that are not finite, or zero where codes are not."""
    codes, scale = packed.tensors["codes"], packed.tensors["scale"]
    if not scale.isfinite().all():
        raise layer.fail(f"{suffix} holds NaN or infinity.", "The file was written wrongly; get it from elsewhere.")
    if not scale.all():
        _check_zeros(layer, suffix, codes, spread(scale, len(codes)))


def all_finite(numbers: Tensor) -> bool:
    """Whether there is no NaN and no infinity, of 16-bit floats by the exponent's bits: a tenth of the time."""
    import torch

    exponent = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}.get(numbers.dtype)
    if exponent is None or not numbers.numel():
        return bool(numbers.float().isfinite().all())
    return int((numbers.contiguous().view(torch.int16) & exponent).max()) < exponent


def matrix_of(weight: Tensor) -> Tensor:
    """A weight to be quantized, in float32. Raises UserError when it is no matrix of finite numbers."""
    if weight.ndim != 2 or not weight.numel():
        raise UserError(f"A weight of shape {list(weight.shape)} cannot be quantized: it is no matrix.")
    if not weight.isfinite().all():
        raise UserError("A weight that holds NaN or infinity cannot be quantized.", "Its file is damaged.")
    return weight.float()


def _check_zeros(layer: Layer, suffix: str, codes: Tensor, scale: Tensor) -> None:
    """Rows of zeros may have the scale zero (quanto writes that), rows of numbers may not."""
    import torch

    rows, groups = codes.shape[0], scale.shape[1]
    used = codes.view(torch.uint8).unflatten(1, (groups, -1)).any(dim=2)
    lost = used & (scale == 0).expand(rows, -1)
    if lost.any():
        raise layer.fail(
            f"{suffix} is zero for {int(lost.any(dim=1).sum())} of {rows} rows that hold numbers.",
            "The file was written wrongly; get it from elsewhere.",
        )

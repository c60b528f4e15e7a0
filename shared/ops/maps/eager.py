"""The three operations in plain torch: their meaning, and what runs wherever Triton does not.

Nearly without copies in float32: sums widen the numbers as they read them, and a norm takes some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 2**22  # numbers: 16 MiB in float32


def settle(
    x: Tensor, *, bias: Tensor | None, skip: Tensor | None, out: Tensor | None, groups: int, doubled: bool = False
) -> Tensor:
    """See shared.ops.maps."""
    height, width, channels = shape_of(x, doubled)
    kept = torch.empty(height, width, channels, dtype=x.dtype, device=x.device) if out is None else out
    begun = x
    if doubled:
        begun = kept if skip is not kept else torch.empty_like(kept)
        _put_in_places(x, begun)
    if skip is not None:
        begun = torch.add(begun, skip, out=kept)
    if bias is not None:
        begun = torch.add(begun, bias, out=kept)
    if begun is not kept:
        kept.copy_(begun)
    by_row = kept.view(height, width, groups, channels // groups)  # float32 is enough for a row's sum
    total = by_row.sum((1, 3), dtype=torch.float32).double()
    squares = torch.linalg.vector_norm(by_row, dim=(1, 3), dtype=torch.float32).double().square()
    return torch.stack([total.sum(0), squares.sum(0)])[None]


def factors(
    sums: Sequence[Tensor], count: int, weight: Tensor, bias: Tensor, eps: float, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See shared.ops.maps."""
    total = torch.cat(list(sums)).sum(0, dtype=torch.float64) / (count * (len(weight) // sums[0].shape[2]))
    mean = total[0]
    inverse = torch.rsqrt((total[1] - mean.square()).clamp(min=0) + eps)
    mean, inverse = (per_group.repeat_interleave(len(weight) // len(per_group)) for per_group in (mean, inverse))
    factor = weight * inverse
    summand = bias + factor * ((0.0 if before is None else before) - mean)
    return factor.float(), summand.float()


def normalise(x: Tensor, factor: Tensor, summand: Tensor, out: Tensor, *, silu: bool = True) -> None:
    """See shared.ops.maps."""
    for rows in _bands(len(x), x[0].numel()):
        wide = torch.addcmul(summand, x[rows], factor)
        out[rows] = F.silu(wide, inplace=True) if silu else wide


def shape_of(x: Tensor, doubled: bool) -> tuple[int, int, int]:
    """(H, W, C) of what settle() makes of x."""
    height, width, channels = x.shape
    return (2 * (height - 1), 2 * (width - 1), channels // 4) if doubled else (height, width, channels)


def _put_in_places(places: Tensor, out: Tensor) -> None:
    """places: (h + 1, w + 1, 4 * C). out: (2 h, 2 w, C)."""
    height, width, channels = out.shape
    for place in range(4):
        row, column = divmod(place, 2)
        some = places[row : row + height // 2, column : column + width // 2]
        out[row::2, column::2] = some[..., place * channels : (place + 1) * channels]


def _bands(height: int, numbers: int) -> Iterator[slice]:
    """An even number of rows of so many numbers at a time."""
    step = max(2, _AT_ONCE // numbers // 2 * 2)
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))

"""Scales of 8-bit weights by blocks: one for a row, for some rows below each other, or for all of them.

A scale tensor (s, groups) serves a matrix of `rows` rows, each of its own rows / s of them, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def spread(scale: Tensor, rows: int) -> Tensor:
    """The scales of each row, (rows, groups); (1, groups) stays as it is."""
    return scale if len(scale) in (1, rows) else scale.repeat_interleave(rows // len(scale), dim=0)


def cut(scale: Tensor, rows: int, start: int, stop: int) -> Tensor:
    """The scales of rows [start, stop): a view where no block of rows is cut through."""
    height = rows // len(scale)
    if len(scale) == 1:
        return scale
    if start % height or stop % height:
        return spread(scale, rows)[start:stop]
    return scale[start // height : stop // height]


def stacked(scales: Sequence[Tensor], heights: Sequence[int]) -> list[Tensor]:
    """What, one behind the other, are the scales of matrices of these heights on top of each other.

    Views where all have blocks as high, and several groups: what multiplies by one scale of a row wants one of each.
    """
    of_blocks = {height // len(scale) for scale, height in zip(scales, heights, strict=True)}
    if len(of_blocks) == 1 and scales[0].shape[1] > 1:
        return list(scales)
    return [
        s if len(s) == height else spread(s, height).expand(height, -1).contiguous()
        for s, height in zip(scales, heights, strict=True)
    ]

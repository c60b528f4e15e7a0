"""Tiles that cover a large picture, and how they are blended where they overlap."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from shared.app.editing.inpainting import Box
from shared.app.settings import GenerationSettings

if TYPE_CHECKING:
    import numpy as np

    Levels = np.ndarray[Any, np.dtype[Any]]

TILE_OVERLAP = 64  # pixels by which neighbouring tiles overlap at least


def tile_boxes(size: tuple[int, int], settings: GenerationSettings, block: int) -> list[Box]:
    """Tiles of the chosen resolution that cover the size, evenly spread, row by row."""
    columns = _tile_spans(size[0], min(settings.width, size[0]), block)
    rows = _tile_spans(size[1], min(settings.height, size[1]), block)
    return [(left, top, right, bottom) for top, bottom in rows for left, right in columns]


def _tile_spans(length: int, tile: int, block: int) -> list[tuple[int, int]]:
    """[start, end) of equal tiles over `length` pixels, TILE_OVERLAP or more overlapping; starts are even numbers of
    blocks, so that latent cells coincide."""
    overlap = min(TILE_OVERLAP, tile // 2)
    count = 1 if tile >= length else math.ceil((length - overlap) / (tile - overlap))
    starts = [round(i * (length - tile) / max(count - 1, 1) / block) * block for i in range(count)]
    return [(start, start + tile) for start in starts]


def tile_weight(size: tuple[int, int]) -> Levels:
    """(H, W, 1) float32: how much a tile counts at each pixel, rising from its border over TILE_OVERLAP pixels."""
    import numpy as np

    ramps = []
    for side in size:
        from_border = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1
        ramps.append(np.minimum(from_border / TILE_OVERLAP, 1).astype(np.float32))
    return (ramps[1][:, None] * ramps[0][None, :])[:, :, None]

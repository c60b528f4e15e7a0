"""The picture at a quarter of its size, enlarged again: what a Tile ControlNet adds detail to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from shared.preprocess import Picture

FACTOR = 4


def process(picture: Picture) -> Picture:
    """(H, W, 3) uint8 RGB, averaged over squares of FACTOR pixels and enlarged by cubic interpolation."""
    height, width = picture.shape[:2]
    small = cv2.resize(picture, (max(width // FACTOR, 1), max(height // FACTOR, 1)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.uint8)

"""The picture without its colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from shared.preprocess import Picture


def process(picture: Picture) -> Picture:
    """(H, W, 3) uint8 RGB to its luma (ITU-R BT.601) in all three channels."""
    return np.repeat(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[:, :, None], 3, axis=2).astype(np.uint8)

"""Fine lines, white on black: where the picture is darker than what lies around it, as a pen would draw it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from shared.preprocess import Picture

SIGMA = 6.0  # pixels at 512: how far around a pixel its neighbourhood reaches
THRESHOLD = 8  # levels: weaker lines are paper grain


def process(picture: Picture) -> Picture:
    """(H, W, 3) uint8 RGB to lines of varying strength, up to 255 on 0, in all three channels."""
    pixels = picture.astype(np.float32)
    around = cv2.GaussianBlur(pixels, (0, 0), SIGMA * max(min(picture.shape[:2]) / 512, 0.25))
    darker = (around - pixels).max(axis=2).clip(0, 255)
    strongest = darker[darker > THRESHOLD]
    if strongest.size:
        darker = (darker / max(float(np.median(strongest)), 16.0) * 127).clip(0, 255)
    else:
        darker[:] = 0
    return np.repeat(darker.astype(np.uint8)[:, :, None], 3, axis=2)

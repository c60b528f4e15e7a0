"""Soft colours without detail: a Gaussian blur."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from shared.preprocess import Picture

SIGMA = 1 / 48  # of the shorter side


def process(picture: Picture) -> Picture:
    """(H, W, 3) uint8 RGB, blurred."""
    return cv2.GaussianBlur(picture, (0, 0), max(min(picture.shape[:2]) * SIGMA, 0.5)).astype(np.uint8)

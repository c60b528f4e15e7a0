"""Thick outlines, white on black, as if drawn by hand: only what is large enough to be drawn survives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from shared.preprocess import canny

if TYPE_CHECKING:
    from shared.preprocess import Picture

DETAIL = 1 / 128  # of the shorter side: smaller things are blurred away before edges are looked for
LOW, HIGH = 40, 80  # gradients, lower than for plain edges: blurred ones are flatter
STROKE = 1 / 96  # of the shorter side: width of a line


def process(picture: Picture) -> Picture:
    """(H, W, 3) uint8 RGB to strokes, 255 on 0, in all three channels."""
    side = min(picture.shape[:2])
    blurred = cv2.GaussianBlur(picture, (0, 0), max(side * DETAIL, 0.5)).astype(np.uint8)
    edges = canny.process(blurred, LOW, HIGH)
    width = max(round(side * STROKE), 2)
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    return cv2.dilate(edges, brush).astype(np.uint8)

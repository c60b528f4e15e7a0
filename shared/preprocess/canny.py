"""Edges, white on black: the detector of Canny 1986."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from shared.preprocess import Picture

# Gradients; the values that ControlNets are trained with (lllyasviel/ControlNet, gradio_canny2image.py).
LOW, HIGH = 100, 200


def process(picture: Picture, low: float = LOW, high: float = HIGH) -> Picture:
    """(H, W, 3) uint8 RGB to edges of one pixel, 255 on 0, in all three channels; the strongest channel decides.

    low, high: an edge begins where the gradient is above `high` and goes on while it is above `low`.
    """
    edges = cv2.Canny(picture, low, high)
    return np.repeat(edges[:, :, None], 3, axis=2).astype(np.uint8)

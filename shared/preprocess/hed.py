"""Soft edges, white on black: holistically nested edge detection (Xie and Tu 2015, arXiv 1504.06375).

The weights are those of ControlNet's annotator in ONNX. They take RGB from 0 to 1 and answer with edges from 0 to 1, as
the program does whose author converted them (axodox/axodox-machinelearning, EdgeDetector.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from shared.preprocess.onnx_model import OnnxModel
from shared.quant.errors import CheckpointError

if TYPE_CHECKING:
    from shared.preprocess import Picture

MULTIPLE = 16  # pixels: the network halves the picture four times
LONGEST = 1024  # pixels on the longer side; larger pictures are looked at smaller


def load(path: Path) -> Callable[[Picture], Picture]:
    """The detector in an ONNX file: (H, W, 3) uint8 RGB to edges of varying strength in all three channels."""
    model = OnnxModel(path)

    def process(picture: Picture) -> Picture:
        height, width = picture.shape[:2]
        rows, columns = model.input_size or _size_near(height, width)
        shown = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_AREA)
        edges = model(shown.transpose(2, 0, 1).astype(np.float32) / np.float32(255))[0].squeeze()
        if edges.ndim != 2 or not np.isfinite(edges).all():
            raise CheckpointError(f"{path}: answered with {edges.shape} numbers, expected one for each pixel.")
        levels = (edges.clip(0, 1) * 255).round().astype(np.uint8)
        levels = cv2.resize(levels, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
        return np.repeat(levels[:, :, None], 3, axis=2)

    return process


def _size_near(height: int, width: int) -> tuple[int, int]:
    scale = min(LONGEST / max(height, width), 1)
    rows, columns = (max(round(side * scale / MULTIPLE), 1) * MULTIPLE for side in (height, width))
    return rows, columns

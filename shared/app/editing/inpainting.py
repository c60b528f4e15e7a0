"""Where a mask is drawn: the canvas with its margins, how much shows where, and what is cut out for it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from shared.app.edit_settings import EditSettings
from shared.app.pictures import extend_border
from shared.app.settings import GenerationSettings
from shared.quant.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Levels = np.ndarray[Any, np.dtype[Any]]

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, as Pillow has them

CONTEXT = 0.25  # what is shown around a mask, as a share of its longer side
MIN_CONTEXT = 32  # pixels
MAX_ZOOM = 2  # a small mask's surroundings are enlarged at most so much; beyond, the network sees too little around


def canvas_of(picture: Image.Image, mask: Image.Image | None, edit: EditSettings) -> tuple[Image.Image, Levels]:
    """The picture with its margins, and (H, W) uint8 how much of the drawing shows at each pixel."""
    import cv2
    import numpy as np

    left, top, right, bottom = margins = edit.margins
    canvas = extend_border(picture, *margins)
    inner = np.zeros((picture.height, picture.width), np.uint8)
    if mask is not None:
        inner = np.asarray(mask)
    grow = edit.mask_expand
    if grow < 0:
        # With a rim of zeros, so that a mask does not hold on to the picture's border.
        depth = cv2.distanceTransform(np.pad(inner, 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
        inner = np.where(depth > -grow, 255, 0)
    solid = np.pad(inner, ((top, bottom), (left, right)), constant_values=255) > 0
    if not solid.any():
        raise UserError(f'"mask_expand" {grow} leaves nothing of the mask.', "Take a number nearer to 0.")
    if grow > 0 or edit.mask_feather:
        away = cv2.distanceTransform((~solid).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    else:
        away = np.where(solid, 0.0, np.inf)
    beyond = away - max(grow, 0)
    fade = np.clip(1 - beyond / (edit.mask_feather + 1), 0, 1)  # 1 inside, 0 from feather + 1 pixels on
    return canvas, np.ceil(fade * 255).astype(np.uint8)


def box_of(fade: Levels, canvas: tuple[int, int], settings: GenerationSettings) -> Box:
    """What is cut out and drawn: the mask with some context, of the drawing's shape as far as the canvas allows."""
    import numpy as np

    width, height = canvas
    if settings.edit.inpaint_area == "whole":
        return (0, 0, width, height)
    rows, columns = np.flatnonzero(fade.any(axis=1)), np.flatnonzero(fade.any(axis=0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    around = max(round(CONTEXT * max(right - left, bottom - top)), MIN_CONTEXT)
    wanted_width = max(right - left + 2 * around, settings.width // MAX_ZOOM)
    wanted_height = max(bottom - top + 2 * around, settings.height // MAX_ZOOM)
    shape = settings.width / settings.height
    wanted_width = max(wanted_width, round(wanted_height * shape))
    wanted_height = max(wanted_height, round(wanted_width / shape))
    left, right = _span((left + right) / 2, wanted_width, width)
    top, bottom = _span((top + bottom) / 2, wanted_height, height)
    return (left, top, right, bottom)


def working_size(box: Box, settings: GenerationSettings, block: int) -> tuple[int, int]:
    """The box's shape with as many pixels as the chosen resolution has."""
    width, height = box[2] - box[0], box[3] - box[1]
    if (width, height) == (settings.width, settings.height):
        return width, height
    scale = math.sqrt(settings.width * settings.height / (width * height))
    return scaled((width, height), scale, block)


def scaled(size: tuple[int, int], scale: float, block: int) -> tuple[int, int]:
    """A size times a factor, as multiples of a block of pixels."""
    width, height = (max(round(side * scale / block), 1) * block for side in size)
    return width, height


def _span(middle: float, wanted: int, available: int) -> tuple[int, int]:
    """[start, end) of `wanted` pixels around the middle, moved and if need be cut to lie in [0, available)."""
    length = min(wanted, available)
    start = min(max(round(middle - length / 2), 0), available - length)
    return start, start + length

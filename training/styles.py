"""Styles that a LoRA can teach the demo: the same scenes, redrawn. Made of light and colour rather than of texture,
because the latents hold 8x8 pixels in sixteen numbers and have no room for grain or hatching.

A style keeps what the caption says of kinds, sizes and places; what it does to colours is its own business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from training.outlines import drawing_of, light, to_bytes
from training.scenes import COLOURS, Scene

_NEON_GROUND = 0.2  # of the ground's light that is left
_NEON_BODY = 0.25  # how far a shape's colour moves towards white
_NEON_GLOW = 0.7
_NEON_REACH = 0.13  # deviation of the glow, of the shape's extent
_PAPER, _FILL, _LINE = (22, 58, 132), (58, 112, 184), (232, 240, 250)  # RGB of a blueprint
_LINE_WIDTH = 0.04  # of the picture's shorter side


@dataclass(frozen=True)
class Style:
    """draw: (scene, width, height) -> (height, width, 3) uint8 RGB. description: one sentence for a person."""

    title: str
    description: str
    draw: Callable[[Scene, int, int], NDArray[np.uint8]]


def draw_neon(scene: Scene, width: int, height: int) -> NDArray[np.uint8]:
    """Night: the ground nearly dark, every shape a lamp of its colour that glows into it."""
    drawing = drawing_of(scene, width, height)
    picture = np.array(COLOURS[drawing.ground], np.float32) * (_NEON_GROUND * light(width, height))
    lamps = []
    for shape in drawing.shapes:
        colour = np.array(COLOURS[shape.colour], np.float32)
        colour += (255 - colour) * _NEON_BODY
        mask = shape.mask(width, height)
        glow = cv2.GaussianBlur(mask, (0, 0), _NEON_REACH * shape.extent)
        picture += (colour - picture) * (_NEON_GLOW * glow)[..., None]
        lamps.append((mask, colour))
    for mask, colour in lamps:  # no lamp is dimmed by its neighbour's glow
        picture += (colour - picture) * mask[..., None]
    return to_bytes(picture)


def draw_blueprint(scene: Scene, width: int, height: int) -> NDArray[np.uint8]:
    """White outlines with a pale filling on blue paper, whatever the colours."""
    drawing = drawing_of(scene, width, height)
    picture = np.array(_PAPER, np.float32) * light(width, height)
    for shape in drawing.shapes:
        mask = shape.mask(width, height)
        depth = cv2.distanceTransform((mask > 0.5).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        inside = np.clip(depth - _LINE_WIDTH * min(width, height) + 0.5, 0, 1)[..., None]
        body = np.array(_LINE, np.float32) * (1 - inside) + np.array(_FILL, np.float32) * inside
        picture += (body - picture) * mask[..., None]
    return to_bytes(picture)


STYLES: dict[str, Style] = {
    "neon": Style("Neon", "Shapes glow like lamps on a dark ground.", draw_neon),
    "blueprint": Style("Blueprint", "White outlines on blue paper, whatever the colours.", draw_blueprint),
}

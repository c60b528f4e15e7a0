"""Outlines beyond the eight kinds of scenes.py, of any size, anywhere and turned, painted in the same light.

A network that is to follow edges must not get along with the eight shapes that its captions can name. The outlines to
train with and those to judge with have nothing in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from training.scenes import COLOURS, KINDS, SIZES, Scene, shape_centre, shape_mask

Mask = NDArray[np.float32]  # coverage in [0, 1]

EXTENTS = (0.26, 0.56)  # longest side of a free shape's box, of the picture's shorter side
_TEMPLATE = 512  # pixels along a template
_SUPERSAMPLING = 4
_MARGIN = 0.03  # between a shape and the picture's border, of the shorter side
# The look of scenes.draw_scene.
_LIGHT, _LIGHT_LOSS = 1.04, 0.09
_SHADOW_OPACITY, _SHADOW_SHIFT, _SHADOW_BLUR = 0.24, 0.055, 0.045
_BODY_SLOPE, _BODY_RANGE = 0.09, (0.9, 1.1)

HELD_OUT_OUTLINES: dict[str, list[tuple[float, float]]] = {  # points in [-1, 1]
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.3), (-1, 0.3)],
    "corner": [(-0.9, -0.9), (-0.2, -0.9), (-0.2, 0.2), (0.9, 0.2), (0.9, 0.9), (-0.9, 0.9)],
    "cross": [
        (-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34),
        (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34),
    ],
    "hexagon": [(1, 0), (0.5, 0.866), (-0.5, 0.866), (-1, 0), (-0.5, -0.866), (0.5, -0.866)],
    "keystone": [(-0.5, -0.7), (0.5, -0.7), (1, 0.7), (-1, 0.7)],
    "house": [(0, -1), (0.85, -0.2), (0.85, 0.9), (-0.85, 0.9), (-0.85, -0.2)],
}  # fmt: skip


@dataclass(frozen=True)
class PlacedShape:
    """A shape of a palette colour. template: (512, 512) coverage; extent and centre (x, y) in pixels; turn: radians."""

    template: Mask
    colour: str
    extent: float
    centre: tuple[float, float]
    turn: float = 0.0

    def mask(self, width: int, height: int, shift: float = 0.0) -> Mask:
        """Coverage (height, width) with smooth edges, moved by `shift` pixels to the right and down."""
        fine = _SUPERSAMPLING
        scale = fine * self.extent / _TEMPLATE
        cos, sin = scale * np.cos(self.turn), scale * np.sin(self.turn)
        middle = _TEMPLATE / 2 - 0.5  # pixel centres are integers here
        # only a square that holds the template's corners is supersampled
        half = int(np.ceil(self.extent / np.sqrt(2))) + 1
        left, top = (int(np.floor(c + shift)) - half for c in self.centre)
        x, y = (fine * (c + shift - corner) - 0.5 for c, corner in zip(self.centre, (left, top), strict=True))
        matrix = np.array(
            [[cos, -sin, x - cos * middle + sin * middle], [sin, cos, y - sin * middle - cos * middle]], np.float64
        )
        box = 2 * half + 1
        canvas = cv2.warpAffine(self.template, matrix, (box * fine, box * fine), flags=cv2.INTER_LINEAR)
        small = cv2.resize(canvas, (box, box), interpolation=cv2.INTER_AREA)
        mask = np.zeros((height, width), np.float32)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + box, width), min(top + box, height)
        if x0 < x1 and y0 < y1:
            mask[y0:y1, x0:x1] = small[y0 - top : y1 - top, x0 - left : x1 - left]
        return mask


@dataclass(frozen=True)
class Drawing:
    """What a picture shows: shapes on a ground of a palette colour."""

    ground: str
    shapes: tuple[PlacedShape, ...]


def drawing_of(scene: Scene, width: int, height: int) -> Drawing:
    """A scene of the captions' world as a drawing; painted, it is scenes.draw_scene's picture."""
    side = min(width, height)
    shapes = []
    for shape in scene.shapes:
        x, y = shape_centre(shape, width, height)
        template = shape_mask(shape.kind, _TEMPLATE)
        shapes.append(PlacedShape(template, shape.colour, SIZES[shape.size] * side, (float(x), float(y))))
    return Drawing(scene.ground, tuple(shapes))


def paint(drawing: Drawing, width: int, height: int) -> NDArray[np.uint8]:
    """The picture (height, width, 3) uint8 RGB, with light and shadow as scenes.draw_scene has them."""
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    picture = np.array(COLOURS[drawing.ground], np.float32) * light(width, height)
    for shape in drawing.shapes:
        shadow = shape.mask(width, height, shift=_SHADOW_SHIFT * shape.extent)
        shadow = cv2.GaussianBlur(shadow, (0, 0), _SHADOW_BLUR * shape.extent)
        picture *= 1 - _SHADOW_OPACITY * shadow[..., None]
        slope = ((xs - shape.centre[0]) + (ys - shape.centre[1])) / shape.extent
        lit = np.clip(1.0 - _BODY_SLOPE * slope, *_BODY_RANGE)[..., None]
        picture += (np.array(COLOURS[shape.colour], np.float32) * lit - picture) * shape.mask(width, height)[..., None]
    return to_bytes(picture)


def light(width: int, height: int) -> NDArray[np.float32]:
    """The light on the ground (height, width, 1): brighter at the upper left, darker at the lower right."""
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    return (_LIGHT - _LIGHT_LOSS * (xs / width + ys / height) / 2)[..., None]


def to_bytes(picture: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Rounded to uint8."""
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def sample_drawing(rng: np.random.Generator, width: int, height: int, *, held_out: bool) -> Drawing:
    """One shape of a random outline, colour, size, turn and place on a ground of another colour.

    held_out: an outline out of HELD_OUT_OUTLINES, which training never draws.
    """
    ground, colour = (str(c) for c in rng.choice(list(COLOURS), size=2, replace=False))
    if held_out:
        template = _filled(np.array(HELD_OUT_OUTLINES[str(rng.choice(list(HELD_OUT_OUTLINES)))]))
    else:
        template = _TRAINING[int(rng.integers(len(_TRAINING)))](rng)
    side = min(width, height)
    extent = float(rng.uniform(*EXTENTS)) * side
    turn = float(rng.uniform(0, 2 * np.pi))
    # a turned template reaches at most this far from its centre
    ys, xs = np.nonzero(template > 0.5)
    reach = float(np.hypot(xs - _TEMPLATE / 2, ys - _TEMPLATE / 2).max()) / _TEMPLATE * extent + _MARGIN * side
    reach = min(reach, side / 2)
    centre = (float(rng.uniform(reach, width - reach)), float(rng.uniform(reach, height - reach)))
    return Drawing(ground, (PlacedShape(template, colour, extent, centre, turn),))


def _filled(points: NDArray[np.floating]) -> Mask:
    """A template of the polygon, whose points lie within [-1, 1]."""
    canvas = np.zeros((_TEMPLATE, _TEMPLATE), np.uint8)
    fixed_point = np.round((points + 1) / 2 * _TEMPLATE * 16).astype(np.int32)  # 4 fractional bits
    cv2.fillPoly(canvas, [fixed_point], 255, lineType=cv2.LINE_8, shift=4)
    return canvas.astype(np.float32) / 255


def _known_kind(rng: np.random.Generator) -> Mask:
    return shape_mask(str(rng.choice(KINDS)), _TEMPLATE)


def _ellipse(rng: np.random.Generator) -> Mask:
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    return _filled(np.stack([np.cos(angles), rng.uniform(0.4, 0.8) * np.sin(angles)], 1))


def _rectangle(rng: np.random.Generator) -> Mask:
    y = rng.uniform(0.3, 0.75)
    return _filled(np.array([[-1, -y], [1, -y], [1, y], [-1, y]]))


def _spikes(rng: np.random.Generator) -> Mask:
    """A polygon with 5 to 11 corners at random distances and unequal angles; never a regular one."""
    count = int(rng.integers(5, 12))
    angles = (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * 2 * np.pi / count
    radii = rng.uniform(0.45, 1.0, count)
    return _filled(np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None])


def _blob(rng: np.random.Generator) -> Mask:
    """A smooth closed curve: a circle with four waves of random strength on it."""
    angles = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    radius = np.ones_like(angles)
    for waves in range(2, 6):
        radius += rng.uniform(0, 0.5 / waves) * np.cos(waves * angles + rng.uniform(0, 2 * np.pi))
    return _filled(np.stack([np.cos(angles), np.sin(angles)], 1) * (radius / radius.max())[:, None])


_TRAINING: tuple[Callable[[np.random.Generator], Mask], ...] = (_known_kind, _ellipse, _rectangle, _spikes, _blob)

"""Scenes of coloured shapes on a coloured ground, and how they are drawn: the whole world the demo model
knows.

A `Scene` says what is to be seen (ground colour, one or two shapes with kind, colour, size, place);
`draw_scene` turns it into an RGB picture with soft light, a gentle shadow and smooth edges. Lengths are fractions
of the shorter side unless a name says pixels.

One scene has exactly one picture, and centres stand on a grid of sixteenths, which at 256 pixels are the transformer's
tokens. A first world let size and place wander by a few per cent: no caption speaks of that, so each token of a small
network decided alone, and after 5,000 steps every outline was ragged.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

# RGB; chosen far apart, so that light and shadow never turn one into another
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 38, 44),
    "orange": (247, 130, 18),
    "yellow": (252, 214, 70),
    "green": (52, 152, 74),
    "teal": (38, 186, 180),
    "blue": (42, 88, 204),
    "purple": (128, 60, 176),
    "pink": (255, 152, 192),
    "white": (246, 245, 240),
    "black": (30, 30, 38),
}
KINDS = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "moon")
SIZES: dict[str, float] = {"small": 0.26, "medium": 0.39, "large": 0.56}  # longer side of the shape's box
PLACES: dict[str, tuple[float, float]] = {  # (column, row) of the centre, fractions of width and height
    "left": (0.22, 0.5),
    "right": (0.78, 0.5),
    "top": (0.5, 0.22),
    "bottom": (0.5, 0.78),
    "centre": (0.5, 0.5),
    "top left": (0.22, 0.22),
    "top right": (0.78, 0.22),
    "bottom left": (0.22, 0.78),
    "bottom right": (0.78, 0.78),
}

OPPOSITES = (("left", "right"), ("top", "bottom"))  # what "left of" and "above" mean

_P_OPPOSITE = 0.2  # of two shapes
_SUPERSAMPLING = 4
_MARGIN = 0.03  # between a shape and the picture's border
_GRID = 16  # centres stand on multiples of the shorter side divided by this
_SHADOW_OPACITY = 0.24
_HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Shape:
    """One object: every field is a key of KINDS, COLOURS, SIZES, PLACES."""

    kind: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows: the ground's colour and one or two shapes of other colours."""

    ground: str
    shapes: tuple[Shape, ...]


def is_held_out(scene: Scene) -> bool:
    """Whether this combination of attributes is kept away from training: one scene in twenty, by a stable hash."""
    shapes = sorted(f"{s.kind}/{s.colour}/{s.size}/{s.place}" for s in scene.shapes)
    digest = hashlib.sha256("|".join([scene.ground, *shapes]).encode()).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0


def sample_scene(rng: np.random.Generator, *, held_out: bool, num_shapes: int | None = None) -> Scene:
    """Draw a random scene from the training or the held-out side of the split.

    num_shapes: 1 or 2; None takes one shape in 65 % of the cases. Two shapes never touch, and have different colours.
    """
    while True:
        count = num_shapes if num_shapes is not None else (1 if rng.random() < 0.65 else 2)
        colours = [str(c) for c in rng.choice(list(COLOURS), size=count + 1, replace=False)]
        if count == 1:
            place = "centre" if rng.random() < 0.15 else str(rng.choice(list(PLACES)))
            shapes = (Shape(str(rng.choice(KINDS)), colours[1], str(rng.choice(list(SIZES))), place),)
        else:
            opposite = rng.random() < _P_OPPOSITE
            pairs = list(OPPOSITES) if opposite else [tuple(rng.choice(list(PLACES), size=2, replace=False))]
            places = [str(p) for p in pairs[int(rng.integers(len(pairs)))]]
            sizes = [str(s) for s in rng.choice(["small", "medium"], size=2)]
            if _would_touch(places, sizes):
                continue
            shapes = tuple(
                Shape(str(rng.choice(KINDS)), colour, size, place)
                for colour, size, place in zip(colours[1:], sizes, places, strict=True)
            )
        scene = Scene(colours[0], shapes)
        if is_held_out(scene) == held_out:
            return scene


def draw_scene(scene: Scene, width: int, height: int) -> NDArray[np.uint8]:
    """Draw the scene; returns (height, width, 3) uint8 RGB."""
    side = min(width, height)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    # light falls from the upper left: 4 % brighter there, 5 % darker at the lower right
    light = 1.04 - 0.09 * (xs / width + ys / height) / 2
    picture = np.array(COLOURS[scene.ground], np.float32) * light[..., None]
    for shape in scene.shapes:
        extent = SIZES[shape.size] * side
        centre = _centre_in_pixels(shape.place, extent, width, height)
        mask = _placed_mask(shape.kind, extent, centre, width, height)
        shadow = _placed_mask(shape.kind, extent, centre + 0.055 * extent, width, height)
        shadow = cv2.GaussianBlur(shadow, (0, 0), 0.045 * extent)
        picture *= 1 - _SHADOW_OPACITY * shadow[..., None]
        # the shape is lit a little more than the ground, along its own diagonal
        slope = ((xs - centre[0]) + (ys - centre[1])) / extent
        body = np.array(COLOURS[shape.colour], np.float32) * np.clip(1.0 - 0.09 * slope, 0.9, 1.1)[..., None]
        picture += (body - picture) * mask[..., None]
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def shape_centre(shape: Shape, width: int, height: int) -> NDArray[np.float64]:
    """Where the middle (x, y) of a shape's box lies, in pixels."""
    return _centre_in_pixels(shape.place, SIZES[shape.size] * min(width, height), width, height)


def shape_mask(kind: str, extent: int) -> NDArray[np.float32]:
    """Coverage (extent, extent) in [0, 1] of one shape whose box's longer side is `extent` pixels."""
    return _placed_mask(kind, float(extent), np.array([extent / 2, extent / 2]), extent, extent)


def _would_touch(places: list[str], sizes: list[str]) -> bool:
    extents = [SIZES[s] for s in sizes]
    first, second = (_centre_in_pixels(p, e, 1, 1) for p, e in zip(places, extents, strict=True))
    needed = sum(extents) / 2 + 0.05
    return bool(max(abs(first - second)) < needed)


def _centre_in_pixels(place: str, extent: float, width: float, height: float) -> NDArray[np.float64]:
    """The place on the grid, moved inwards where the shape would leave the picture."""
    cell = min(width, height) / _GRID
    inset = np.ceil(extent / 2 / cell + _MARGIN * _GRID)
    column, row = PLACES[place]
    x = min(max(np.round(column * width / cell), inset), np.floor(width / cell) - inset)
    y = min(max(np.round(row * height / cell), inset), np.floor(height / cell) - inset)
    return np.array([x, y]) * cell


def _placed_mask(kind: str, extent: float, centre: NDArray[np.float64], width: int, height: int) -> NDArray[np.float32]:
    """Anti-aliased coverage (height, width) float32 in [0, 1] of one shape; `centre` (x, y) of its box in pixels."""
    # only the shape's own box is supersampled: drawing takes about a millisecond instead of ten
    left, top = (int(np.floor(c - extent / 2)) - 1 for c in centre)
    box = int(np.ceil(extent)) + 3
    scale = _SUPERSAMPLING
    canvas = np.zeros((box * scale, box * scale), np.uint8)
    origin = (centre - np.array([left, top])) * scale
    for points, value in _outlines(kind):
        vertices = origin + points * (extent / 2 * scale)
        fixed_point = np.round(vertices * 16).astype(np.int32)  # 4 fractional bits
        cv2.fillPoly(canvas, [fixed_point], value, lineType=cv2.LINE_8, shift=4)
    small = cv2.resize(canvas, (box, box), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    mask = np.zeros((height, width), np.float32)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + box, width), min(top + box, height)
    if x0 < x1 and y0 < y1:
        mask[y0:y1, x0:x1] = small[y0 - top : y1 - top, x0 - left : x1 - left]
    return mask


def _outlines(kind: str) -> list[tuple[NDArray[np.float64], int]]:
    """Polygons painted one after the other as (points, value); the longer side of the shape's box spans [-1, 1]."""
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    if kind == "circle":
        return [(circle, 255)]
    if kind == "ring":
        return [(circle, 255), (circle * 0.52, 0)]
    if kind == "moon":
        return _boxed([(circle, 255), (circle * 0.82 + np.array([0.48, -0.12]), 0)], left=-1.0, right=0.72)
    if kind == "square":
        return [(np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.97, 255)]
    if kind == "diamond":
        return [(np.array([[0, -1], [0.72, 0], [0, 1], [-0.72, 0]]), 255)]
    if kind == "triangle":
        return [(np.array([[0, -0.88], [1, 0.88], [-1, 0.88]]), 255)]
    if kind == "star":
        spokes = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.46)
        points = np.stack([np.cos(spokes) * radii, np.sin(spokes) * radii], 1)
        return [(_centred(points), 255)]
    if kind == "heart":
        x = 16 * np.sin(angles) ** 3
        y = -(13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles))
        return [(_centred(np.stack([x, y], 1)), 255)]
    raise ValueError(f"unknown kind of shape {kind!r}; known: {', '.join(KINDS)}")


def _centred(points: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) / (max(high - low) / 2)


def _boxed(
    outlines: list[tuple[NDArray[np.float64], int]], *, left: float, right: float
) -> list[tuple[NDArray[np.float64], int]]:
    shift = np.array([(left + right) / 2, 0.0])
    return [(points - shift, value) for points, value in outlines]

"""An independent judge of pictures: reads ground colour and every shape's colour, kind, size and place
with OpenCV alone.

It knows the palette and the outlines, never the caption or the model. Whatever it cannot read clearly it
reports as None, so a blurred or broken shape counts as wrong. On drawn truth it is right in more than 99 %
of the pictures (tests/training/test_checker.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from training.captions import Caption, Promise
from training.scenes import COLOURS, KINDS, SIZES, shape_mask

_SMALLEST_AREA = 0.006  # of the shorter side squared; a small ring or moon covers four times as much
_GROUND_SHADES = (0.68, 1.08)  # light and shadow multiply the ground by something between these
_SHAPE_DISTANCE = 42.0  # RGB units from every shade of the ground
_COLOUR_DISTANCE = 55.0  # RGB units from the palette at most
_LEAST_SIDE = 256
_TEMPLATE_SIDE = 64
_LEAST_OVERLAP = 0.80  # intersection over union with the best outline
_LEAST_LEAD = 0.02  # ahead of the second best
_COLUMN_BORDERS = (0.39, 0.61)


@dataclass(frozen=True)
class SeenShape:
    """One region that is not ground; None where the reading is unclear."""

    kind: str | None
    colour: str | None
    size: str
    place: str


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    ground: str | None
    shapes: tuple[SeenShape, ...]


@dataclass(frozen=True)
class Verdict:
    """Which promises of a caption a picture keeps; attributes that were not promised count as kept."""

    ground: bool
    colour: bool
    kind: bool
    size: bool
    place: bool
    count: bool

    @property
    def everything(self) -> bool:
        """All of them at once."""
        return all((self.ground, self.colour, self.kind, self.size, self.place, self.count))


def read_picture(picture: NDArray[np.uint8]) -> Reading:
    """picture: (height, width, 3) uint8 RGB."""
    height, width = picture.shape[:2]
    side = min(height, width)
    if side < _LEAST_SIDE:  # one pixel of error would otherwise be a large part of a small shape
        scale = -(-_LEAST_SIDE // side)
        picture = cv2.resize(picture, (width * scale, height * scale), interpolation=cv2.INTER_CUBIC)
        height, width, side = height * scale, width * scale, side * scale
    frame = max(2, side // 40)
    strips = (picture[:frame], picture[-frame:], picture[:, :frame], picture[:, -frame:])
    border = np.concatenate([strip.reshape(-1, 3) for strip in strips])
    ground_rgb = np.median(border.astype(np.float32), axis=0)
    mask = _not_ground(picture, ground_rgb)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    shapes = []
    for label in range(1, count):
        if stats[label, cv2.CC_STAT_AREA] >= _SMALLEST_AREA * side * side:
            x, y, w, h = (int(stats[label, i]) for i in range(4))
            region = (labels[y : y + h, x : x + w] == label).astype(np.uint8)
            shapes.append(_read_shape(picture[y : y + h, x : x + w], region, x, y, width, height))
    return Reading(_nearest_colour(ground_rgb), tuple(shapes))


def judge_picture(picture: NDArray[np.uint8], caption: Caption) -> Verdict:
    """Compare a picture with what its caption promises. With two shapes the better of both assignments counts."""
    reading = read_picture(picture)
    count = len(reading.shapes) == len(caption.shapes)
    ground = caption.ground is None or caption.ground == reading.ground
    assignments = [reading.shapes, reading.shapes[::-1]] if len(reading.shapes) == 2 else [reading.shapes]
    best: Verdict | None = None
    for seen in assignments:
        # a missing shape keeps no promise; surplus shapes are caught by `count`
        pairs = [(promise, seen[i] if i < len(seen) else None) for i, promise in enumerate(caption.shapes)]
        verdict = Verdict(
            ground=ground,
            colour=all(_keeps(p, s, "colour") for p, s in pairs),
            kind=all(_keeps(p, s, "kind") for p, s in pairs),
            size=all(_keeps(p, s, "size") for p, s in pairs),
            place=all(_keeps(p, s, "place") for p, s in pairs),
            count=count,
        )
        if best is None or _score(verdict) > _score(best):
            best = verdict
    assert best is not None
    return best


def _score(verdict: Verdict) -> int:
    return verdict.colour + verdict.kind + verdict.size + verdict.place


def _keeps(promise: Promise, seen: SeenShape | None, attribute: str) -> bool:
    promised = getattr(promise, attribute)
    return promised is None or (seen is not None and getattr(seen, attribute) == promised)


def _not_ground(picture: NDArray[np.uint8], ground_rgb: NDArray[np.floating]) -> NDArray[np.uint8]:
    """1 where a pixel is far from every lit or shaded version of the ground."""
    pixels = picture.astype(np.float32)
    shade = np.clip(pixels @ ground_rgb / max(float(ground_rgb @ ground_rgb), 1.0), *_GROUND_SHADES)
    distance = np.linalg.norm(pixels - shade[..., None] * ground_rgb, axis=2)
    mask = (distance > _SHAPE_DISTANCE).astype(np.uint8)
    return cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))


def _read_shape(
    patch: NDArray[np.uint8], region: NDArray[np.uint8], x: int, y: int, width: int, height: int
) -> SeenShape:
    h, w = region.shape
    inner = cv2.erode(region, np.ones((3, 3), np.uint8))
    chosen = inner if inner.any() else region
    colour = _nearest_colour(np.median(patch[chosen > 0].astype(np.float32), axis=0))
    extent = max(w, h) / min(width, height)
    size = min(SIZES, key=lambda name: abs(np.log(SIZES[name] / extent)))
    column, row = (x + w / 2) / width, (y + h / 2) / height
    return SeenShape(_nearest_kind(region), colour, size, _place(column, row))


def _place(column: float, row: float) -> str:
    low, high = _COLUMN_BORDERS
    across = "left" if column < low else "right" if column > high else ""
    down = "top" if row < low else "bottom" if row > high else ""
    return f"{down} {across}".strip() or "centre"


def _nearest_colour(rgb: NDArray[np.floating]) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in COLOURS.items()}
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= _COLOUR_DISTANCE else None


def _nearest_kind(region: NDArray[np.uint8]) -> str | None:
    seen = _normalised(region)
    overlaps = {kind: _overlap(seen, outline) for kind, outline in _outlines().items()}
    first, second = sorted(overlaps, key=lambda kind: -overlaps[kind])[:2]
    clear = overlaps[first] >= _LEAST_OVERLAP and overlaps[first] - overlaps[second] >= _LEAST_LEAD
    return first if clear else None


def _overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    return float((first & second).sum() / (first | second).sum())


def _normalised(region: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The region with its longer side scaled to the template's, centred on it."""
    h, w = region.shape
    scale = _TEMPLATE_SIDE / max(h, w)
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    small = cv2.resize(region.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    canvas = np.zeros((_TEMPLATE_SIDE, _TEMPLATE_SIDE), np.float32)
    top, left = (_TEMPLATE_SIDE - size[1]) // 2, (_TEMPLATE_SIDE - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = small
    return canvas > 0.5


@lru_cache(maxsize=1)
def _outlines() -> dict[str, NDArray[np.bool_]]:
    outlines = {}
    for kind in KINDS:
        mask = (shape_mask(kind, 4 * _TEMPLATE_SIDE) > 0.5).astype(np.uint8)
        x, y, w, h = cv2.boundingRect(mask)
        outlines[kind] = _normalised(mask[y : y + h, x : x + w])
    return outlines

"""People as coloured stick figures with faces and hands: DWPose (Yang et al. 2023, arXiv 2307.15880).

Two networks: YOLOX finds the people, each is cut out, and DWPose finds 133 points on each (COCO-WholeBody): 17 of the
body, 6 of the feet, 68 of the face, 21 of each hand. They are drawn as OpenPose does, whose pictures ControlNets know:
18 points of the body (the neck is the middle of the shoulders), joined in the colours of the rainbow.

What the networks take and give (sources: Megvii-BaseDetection/YOLOX demo/ONNXRuntime, open-mmlab/mmpose simcc):
* YOLOX: BGR 0 to 255, at the top left of a grey square. For each cell of three grids, 8, 16 and 32 pixels wide: box
  centre and size relative to the cell (the size as a logarithm), how sure that it is a thing, and what, of 80 kinds.
* DWPose: RGB by ImageNet's statistics. For each point how likely each column and each row is, in half pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from shared.preprocess.onnx_model import OnnxModel
from shared.quant.errors import CheckpointError

if TYPE_CHECKING:
    from shared.preprocess import Picture

    Numbers = np.ndarray[Any, np.dtype[Any]]

STRIDES = (8, 16, 32)  # pixels: the cells of YOLOX's grids
PERSON = 0  # of COCO's 80 kinds
SURE_ENOUGH = 0.3  # of a person, and of a point
OVERLAP = 0.45  # boxes that share more of their area are one person
GREY = 114  # what fills the rest of YOLOX's square
MARGIN = 1.25  # a box is enlarged by this before the person is cut out
MEAN = np.array((123.675, 116.28, 103.53), np.float32)  # ImageNet's, for 0 to 255
DEVIATION = np.array((58.395, 57.12, 57.375), np.float32)
POINTS = 133
PER_PIXEL = 2  # columns and rows are told in half pixels

FACE, LEFT_HAND, RIGHT_HAND = slice(23, 91), slice(91, 112), slice(112, 133)
SHOULDERS = (5, 6)
# OpenPose's 18 points as COCO's; the neck (-1) is worked out.
BODY = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
RAINBOW = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip
LIMB_SHADE = 0.6  # limbs are darker than the points they join
FINGERS = tuple(pair for tip in (4, 8, 12, 16, 20) for pair in pairwise((0, *range(tip - 3, tip + 1))))
DRAWN_AT = 512  # pixels of the shorter side at which a stroke is STROKE wide
STROKE = 4


def load(detector: Path, estimator: Path) -> Callable[[Picture], Picture]:
    """YOLOX's and DWPose's ONNX files: (H, W, 3) uint8 RGB to figures on black; black where there is nobody."""
    find, estimate = OnnxModel(detector), OnnxModel(estimator)
    for model in (find, estimate):
        if model.input_size is None:
            raise CheckpointError(f"{model.path}: takes pictures of any size, so it is not the model expected.")

    def process(picture: Picture) -> Picture:
        canvas = np.zeros_like(picture)
        for box in find_people(find, picture):
            points, sure = find_points(estimate, picture, box)
            draw_person(canvas, points, sure)
        return canvas

    return process


def find_people(model: OnnxModel, picture: Picture) -> Numbers:
    """(people, 4) left, top, right, bottom in pixels, the surest first."""
    assert model.input_size is not None
    rows, columns = model.input_size
    height, width = picture.shape[:2]
    scale = min(rows / height, columns / width)
    inner = (max(round(width * scale), 1), max(round(height * scale), 1))
    square = np.full((rows, columns, 3), GREY, np.uint8)
    square[: inner[1], : inner[0]] = cv2.resize(picture, inner, interpolation=cv2.INTER_LINEAR)
    found = model(np.ascontiguousarray(square[:, :, ::-1].transpose(2, 0, 1), dtype=np.float32))[0]
    cells = np.concatenate([_grid(rows // stride, columns // stride, stride) for stride in STRIDES])
    if found.shape[:2] != (1, len(cells)) or found.shape[2] <= 5 + PERSON:
        raise CheckpointError(f"{model.path}: answered with {found.shape} numbers, expected (1, {len(cells)}, 85).")
    answer = found[0]
    centre, size = (answer[:, :2] + cells[:, :2]) * cells[:, 2:], np.exp(answer[:, 2:4]) * cells[:, 2:]
    boxes = np.concatenate([centre - size / 2, size], axis=1) / scale
    sure = answer[:, 4] * answer[:, 5 + PERSON]
    kept = cv2.dnn.NMSBoxes(boxes.tolist(), sure.tolist(), SURE_ENOUGH, OVERLAP)
    chosen = boxes[np.asarray(kept, dtype=np.int64).reshape(-1)]
    return np.concatenate([chosen[:, :2], chosen[:, :2] + chosen[:, 2:]], axis=1)


def find_points(model: OnnxModel, picture: Picture, box: Numbers) -> tuple[Numbers, Numbers]:
    """(133, 2) x and y in pixels of the picture, and (133,) how sure each is, of the person in the box."""
    assert model.input_size is not None
    rows, columns = model.input_size
    centre, size = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * MARGIN
    scale = max(size[0] / columns, size[1] / rows, 1e-6)  # pixels of the picture for one of the network's
    corner = centre - scale * np.array([columns, rows]) / 2
    there = np.array([[1 / scale, 0, -corner[0] / scale], [0, 1 / scale, -corner[1] / scale]])
    cut = cv2.warpAffine(picture, there, (columns, rows), flags=cv2.INTER_LINEAR)
    person = (cut.astype(np.float32) - MEAN) / DEVIATION
    answers = model(np.ascontiguousarray(person.transpose(2, 0, 1)))
    expected = [(1, POINTS, columns * PER_PIXEL), (1, POINTS, rows * PER_PIXEL)]
    if [answer.shape for answer in answers] != expected:
        raise CheckpointError(
            f"{model.path}: answered with {[answer.shape for answer in answers]} numbers, expected {expected}."
        )
    across, down = answers[0][0], answers[1][0]
    places = np.stack([across.argmax(axis=1), down.argmax(axis=1)], axis=1) / PER_PIXEL
    return places * scale + corner, np.minimum(across.max(axis=1), down.max(axis=1))


def draw_person(canvas: Picture, points: Numbers, sure: Numbers) -> None:
    """Draw body, hands and face of one person where they are sure enough, onto (H, W, 3) uint8 RGB."""
    stroke = max(round(STROKE * min(canvas.shape[:2]) / DRAWN_AT), 1)
    seen = sure > SURE_ENOUGH
    neck = points[list(SHOULDERS)].mean(axis=0)
    body = np.array([neck if place < 0 else points[place] for place in BODY])
    body_seen = [bool(seen[list(SHOULDERS)].all()) if place < 0 else bool(seen[place]) for place in BODY]
    for (start, end), colour in zip(LIMBS, RAINBOW, strict=False):
        if body_seen[start] and body_seen[end]:
            _draw_limb(canvas, body[start], body[end], stroke, [round(part * LIMB_SHADE) for part in colour])
    for point, is_seen, colour in zip(body, body_seen, RAINBOW, strict=True):
        if is_seen:
            _draw_dot(canvas, point, stroke, colour)
    for hand in (LEFT_HAND, RIGHT_HAND):
        _draw_hand(canvas, points[hand], seen[hand], stroke)
    for point in points[FACE][seen[FACE]]:
        _draw_dot(canvas, point, max(stroke * 3 // 4, 1), (255, 255, 255))


def _draw_limb(canvas: Picture, start: Numbers, end: Numbers, stroke: int, colour: list[int]) -> None:
    """A slim ellipse from point to point."""
    middle = tuple(int(part) for part in (start + end) / 2)
    along = end - start
    angle = round(float(np.degrees(np.arctan2(along[1], along[0]))))
    axes = (int(np.hypot(*along) / 2), stroke)
    cv2.fillConvexPoly(canvas, np.array(cv2.ellipse2Poly(middle, axes, angle, 0, 360, 1)), colour)


def _draw_hand(canvas: Picture, points: Numbers, seen: Numbers, stroke: int) -> None:
    for number, (start, end) in enumerate(FINGERS):
        if seen[start] and seen[end]:
            colour = [round(255 * part) for part in colorsys.hsv_to_rgb(number / len(FINGERS), 1, 1)]
            cv2.line(canvas, _pixel(points[start]), _pixel(points[end]), colour, max(stroke // 2, 1))
    for point in points[seen]:
        _draw_dot(canvas, point, stroke, (0, 0, 255))


def _draw_dot(canvas: Picture, point: Numbers, radius: int, colour: tuple[int, int, int]) -> None:
    cv2.circle(canvas, _pixel(point), radius, colour, thickness=-1)


def _pixel(point: Numbers) -> tuple[int, int]:
    return int(point[0]), int(point[1])


def _grid(rows: int, columns: int, stride: int) -> Numbers:
    """(rows * columns, 3): column, row and width in pixels of each cell, row by row."""
    y, x = np.mgrid[:rows, :columns]
    return np.stack([x.ravel(), y.ravel(), np.full(rows * columns, stride)], axis=1).astype(np.float32)

"""Outlines of any kind are painted like the scenes of the captions, inside the picture, where they say they are."""

import numpy as np
import pytest

from training.outlines import HELD_OUT_OUTLINES, PlacedShape, drawing_of, paint, sample_drawing
from training.scenes import draw_scene, sample_scene, shape_mask


@pytest.mark.parametrize(("width", "height"), [(256, 256), (384, 256)])
def test_a_scene_painted_as_a_drawing_is_the_same_picture(width: int, height: int) -> None:
    rng = np.random.default_rng(0)

    for _ in range(6):
        scene = sample_scene(rng, held_out=False)
        painted = paint(drawing_of(scene, width, height), width, height).astype(int)
        # of 255; edges are sampled otherwise, everything else agrees
        assert np.abs(painted - draw_scene(scene, width, height)).mean() < 0.3


@pytest.mark.parametrize("held_out", [False, True])
def test_drawings_stay_inside_the_picture(held_out: bool) -> None:
    rng = np.random.default_rng(1)

    for _ in range(25):
        drawing = sample_drawing(rng, 192, 128, held_out=held_out)
        (shape,) = drawing.shapes
        mask = shape.mask(192, 128)
        frame = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert frame.max() == 0
        assert 0.004 < mask.mean() < 0.5
        assert shape.colour != drawing.ground


def test_a_turn_of_a_quarter_turns_the_mask() -> None:
    template = shape_mask("moon", 512)
    upright = PlacedShape(template, "red", 60.0, (64.0, 64.0)).mask(128, 128)

    turned = PlacedShape(template, "red", 60.0, (64.0, 64.0), np.pi / 2).mask(128, 128)

    np.testing.assert_allclose(turned, np.rot90(upright, -1), atol=0.02)
    assert np.abs(turned - upright).max() > 0.9


def test_every_held_out_outline_is_drawn() -> None:
    rng = np.random.default_rng(2)

    areas = {round(float(sample_drawing(rng, 64, 64, held_out=True).shapes[0].template.mean()), 4) for _ in range(60)}

    assert len(areas) == len(HELD_OUT_OUTLINES)

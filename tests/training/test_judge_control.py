"""The judge of control sees outlines and colours as they were drawn, and not where they were not."""

import numpy as np

from training.judge_control import has_colours, overlap, shape_of
from training.outlines import Drawing, paint, sample_drawing


def drawings(count: int) -> list[Drawing]:
    rng = np.random.default_rng(5)
    return [sample_drawing(rng, 256, 256, held_out=True) for _ in range(count)]


def test_a_painted_drawing_overlaps_with_its_own_outline() -> None:
    for drawing in drawings(12):
        seen = shape_of(paint(drawing, 256, 256), drawing)

        assert overlap(seen, drawing.shapes[0].mask(256, 256) > 0.5) > 0.95


def test_another_drawing_in_the_same_colours_does_not() -> None:
    first, second = drawings(2)
    other = Drawing(
        first.ground, (second.shapes[0].__class__(**{**vars(second.shapes[0]), "colour": first.shapes[0].colour}),)
    )

    seen = shape_of(paint(other, 256, 256), first)

    assert overlap(seen, first.shapes[0].mask(256, 256) > 0.5) < 0.6


def test_the_asked_colours_are_read_and_others_are_not() -> None:
    for drawing in drawings(6):
        (shape,) = drawing.shapes
        exchanged = Drawing(shape.colour, (shape.__class__(**{**vars(shape), "colour": drawing.ground}),))

        assert has_colours(paint(drawing, 256, 256), drawing)
        assert not has_colours(paint(exchanged, 256, 256), drawing)


def test_nothing_overlaps_with_nothing() -> None:
    nothing = np.zeros((4, 4), bool)

    assert overlap(nothing, nothing) == 0
    assert overlap(~nothing, ~nothing) == 1

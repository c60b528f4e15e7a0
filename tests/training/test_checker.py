"""The judge itself is judged: on drawn truth it must be right, and on broken pictures it must say so."""

import numpy as np
import pytest

from training.captions import write_caption
from training.checker import judge_picture, read_picture
from training.scenes import KINDS, Scene, Shape, draw_scene, sample_scene


def test_checker_is_right_on_at_least_99_percent_of_1000_drawn_scenes() -> None:
    rng = np.random.default_rng(7)
    sizes = [(256, 256), (384, 256), (256, 384)]
    right = 0

    for i in range(1000):
        scene = sample_scene(rng, held_out=bool(i % 2))
        picture = draw_scene(scene, *sizes[i % 3])
        right += judge_picture(picture, write_caption(scene, rng, complete=True)).everything

    assert right >= 990


@pytest.mark.parametrize("attribute", ["ground", "colour", "kind", "size", "place"])
def test_checker_names_the_attribute_that_is_wrong(attribute: str) -> None:
    shape = {"kind": "star", "colour": "red", "size": "medium", "place": "left"}
    told = Scene("yellow", (Shape(**shape),))
    other = {"kind": "heart", "colour": "blue", "size": "large", "place": "top right"}
    drawn = (
        Scene("teal", told.shapes)
        if attribute == "ground"
        else Scene("yellow", (Shape(**{**shape, attribute: other[attribute]}),))
    )
    rng = np.random.default_rng(0)

    verdict = judge_picture(draw_scene(drawn, 256, 256), write_caption(told, rng, complete=True))

    wrong = {a for a in ("ground", "colour", "kind", "size", "place", "count") if not getattr(verdict, a)}
    assert wrong == {attribute}


def test_missing_shape_keeps_no_promise() -> None:
    rng = np.random.default_rng(0)
    scene = Scene("white", (Shape("ring", "purple", "small", "top"),))
    empty = draw_scene(Scene("white", ()), 256, 256)

    verdict = judge_picture(empty, write_caption(scene, rng, complete=True))

    assert verdict.ground
    assert not any((verdict.colour, verdict.kind, verdict.size, verdict.place, verdict.count))


def test_blob_is_no_kind_at_all() -> None:
    picture = draw_scene(Scene("blue", ()), 256, 256)
    picture[60:200, 60:100] = (250, 245, 240)
    picture[160:200, 60:180] = (250, 245, 240)

    (seen,) = read_picture(picture).shapes

    assert seen.kind is None


def test_two_shapes_are_matched_whatever_the_order_they_are_named_in() -> None:
    rng = np.random.default_rng(0)
    left, right = Shape("circle", "green", "small", "left"), Shape("moon", "white", "medium", "right")
    picture = draw_scene(Scene("black", (left, right)), 384, 256)

    for order in ((left, right), (right, left)):
        assert judge_picture(picture, write_caption(Scene("black", order), rng, complete=True)).everything


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_at_the_small_training_size(kind: str) -> None:
    picture = draw_scene(Scene("orange", (Shape(kind, "blue", "small", "centre"),)), 128, 128)

    (seen,) = read_picture(picture).shapes

    assert (seen.kind, seen.colour, seen.size, seen.place) == (kind, "blue", "small", "centre")

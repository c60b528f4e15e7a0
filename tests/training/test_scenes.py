"""Drawing: one scene has one picture; shapes stand on the grid, inside and apart."""

import numpy as np
import pytest

from training.scenes import KINDS, PLACES, SIZES, Scene, Shape, draw_scene, sample_scene, shape_centre, shape_mask


def test_one_scene_has_one_picture() -> None:
    scene = sample_scene(np.random.default_rng(0), held_out=False)

    first, second = (draw_scene(scene, 96, 64) for _ in range(2))

    assert first.shape == (64, 96, 3) and first.dtype == np.uint8
    assert np.array_equal(first, second)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (384, 256), (256, 384)])
def test_every_centre_stands_between_the_transformers_tokens(width: int, height: int) -> None:
    for size in SIZES:
        centres = {place: shape_centre(Shape("circle", "red", size, place), width, height) for place in PLACES}

        assert all((centre % 16 == 0).all() for centre in centres.values()), size
        assert tuple(centres["centre"]) == (width / 2, height / 2)
        mirrored = centres["top left"] + centres["bottom right"]
        assert tuple(mirrored) == (width, height), size


def test_no_shape_reaches_the_border() -> None:
    for kind in KINDS:
        for place in PLACES:
            for size in SIZES:
                picture = draw_scene(Scene("white", (Shape(kind, "red", size, place),)), 96, 96).astype(int)
                frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
                assert (frame[:, 0] - frame[:, 1]).max() < 20, (kind, place, size)  # white stays white


def test_every_kind_fills_its_box() -> None:
    for kind in KINDS:
        ys, xs = np.where(shape_mask(kind, 64) > 0.5)
        assert max(xs.max() - xs.min(), ys.max() - ys.min()) >= 60, kind


def test_edges_are_smooth() -> None:
    mask = shape_mask("circle", 64)

    assert ((mask > 0.1) & (mask < 0.9)).sum() > 60

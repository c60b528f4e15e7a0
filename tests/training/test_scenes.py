"""Drawing: same scene and seed give the same picture; shapes stay inside and apart."""

import numpy as np

from training.scenes import KINDS, PLACES, SIZES, Scene, Shape, draw_scene, sample_scene, shape_mask


def test_same_seed_draws_the_same_picture() -> None:
    scene = sample_scene(np.random.default_rng(0), held_out=False)

    first, second = (draw_scene(scene, 96, 64, np.random.default_rng(5)) for _ in range(2))

    assert first.shape == (64, 96, 3) and first.dtype == np.uint8
    assert np.array_equal(first, second)


def test_no_shape_reaches_the_border() -> None:
    rng = np.random.default_rng(1)
    for kind in KINDS:
        for place in PLACES:
            for size in SIZES:
                picture = draw_scene(Scene("white", (Shape(kind, "red", size, place),)), 96, 96, rng).astype(int)
                frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
                assert (frame[:, 0] - frame[:, 1]).max() < 20, (kind, place, size)  # white stays white


def test_every_kind_fills_its_box() -> None:
    for kind in KINDS:
        ys, xs = np.where(shape_mask(kind, 64) > 0.5)
        assert max(xs.max() - xs.min(), ys.max() - ys.min()) >= 60, kind


def test_edges_are_smooth() -> None:
    mask = shape_mask("circle", 64)

    assert ((mask > 0.1) & (mask < 0.9)).sum() > 60

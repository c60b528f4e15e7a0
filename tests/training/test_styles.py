"""What a style does to light and colour, and what it leaves."""

from dataclasses import replace

import numpy as np
import pytest

from training.outlines import drawing_of
from training.patch_code import load_patch_code
from training.scenes import Scene, Shape, sample_scene
from training.styles import STYLES, draw_blueprint, draw_neon
from training.train_vae import to_pixels

SCENE = Scene("yellow", (Shape("circle", "blue", "large", "centre"),))


def test_neon_shapes_glow_on_a_dark_ground() -> None:
    picture = draw_neon(SCENE, 128, 128).astype(float).sum(2)
    middle, beside, far = picture[64, 64], picture[64, 24], picture[2, 2]  # the circle reaches 36 pixels

    assert middle > beside > 1.3 * far
    assert far < 0.25 * 3 * 255


def test_a_blueprint_says_nothing_of_colours() -> None:
    other = Scene("green", (replace(SCENE.shapes[0], colour="red"),))

    assert np.array_equal(draw_blueprint(SCENE, 128, 128), draw_blueprint(other, 128, 128))


def test_a_blueprints_outline_is_lighter_than_its_filling_and_that_than_the_paper() -> None:
    picture = draw_blueprint(SCENE, 128, 128).astype(float).sum(2)

    paper, line, filling = picture[64, 10], picture[64, 31], picture[64, 64]
    assert line > filling > paper


@pytest.mark.parametrize("name", list(STYLES))
def test_latents_can_express_every_style(name: str) -> None:
    rng = np.random.default_rng(0)
    code = load_patch_code()
    pixels = to_pixels([STYLES[name].draw(sample_scene(rng, held_out=False), 128, 128) for _ in range(6)])

    error = float((code.decode(code.encode(pixels)) - pixels).square().mean())

    assert 10 * np.log10(4 / error) > 26  # dB


def test_a_style_keeps_shapes_where_they_are() -> None:
    mask = drawing_of(SCENE, 128, 128).shapes[0].mask(128, 128)

    for style in STYLES.values():
        picture = style.draw(SCENE, 128, 128).astype(float).sum(2)
        assert picture[mask > 0.5].min() > picture[mask == 0].mean()

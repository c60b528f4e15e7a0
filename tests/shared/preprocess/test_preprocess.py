"""Every preprocessor on a drawn shape whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from shared.preprocess import FILES, PREPROCESSORS, process
from shared.quant.errors import UserError

SIDE = 128
BY_OPENCV = [name for name in PREPROCESSORS if name not in FILES]


def square() -> np.ndarray:
    """A red square on blue, 32 pixels from every border."""
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[:] = (20, 40, 220)
    picture[32:96, 32:96] = (230, 30, 30)
    return picture


def distance_to_outline(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Pixels between each point and the square's outline."""
    outside = np.maximum(np.maximum(32 - rows, rows - 95), np.maximum(32 - columns, columns - 95))
    return np.abs(outside)


@pytest.mark.parametrize("name", BY_OPENCV)
def test_every_one_keeps_size_and_type_and_leaves_its_input_alone(name: str) -> None:
    picture = square()[:, :100]
    before = picture.copy()

    result = process(name, picture)

    assert (result.shape, result.dtype) == (picture.shape, np.uint8)
    assert np.array_equal(picture, before)


@pytest.mark.parametrize(("name", "width"), [("canny", 2), ("scribble", 4), ("lineart", 8)])
def test_lines_lie_along_the_outline_on_black(name: str, width: int) -> None:
    result = process(name, square())

    rows, columns = np.nonzero(result[:, :, 0] > 127)
    assert len(rows) >= 4 * 60  # all four sides
    assert distance_to_outline(rows, columns).max() <= width
    assert not result[:16].any()


def test_scribble_strokes_are_wider_than_edges() -> None:
    assert (process("scribble", square()) > 0).sum() > 1.5 * (process("canny", square()) > 0).sum()


def test_gray_has_no_colour_and_keeps_brightness() -> None:
    result = process("gray", square())

    assert np.ptp(result, axis=2).max() == 0
    assert result[64, 64, 0] == round(0.299 * 230 + 0.587 * 30 + 0.114 * 30)


@pytest.mark.parametrize("name", ["blur", "tile"])
def test_detail_goes_and_flat_colour_stays(name: str) -> None:
    noisy = square()
    noisy[::2, ::2] = 255

    result = process(name, noisy).astype(float)

    assert result[40:88, 40:88].std(axis=(0, 1)).max() < 0.2 * noisy[40:88, 40:88].astype(float).std(axis=(0, 1)).max()
    assert np.abs(process(name, square()).astype(int)[64, 64] - (230, 30, 30)).max() <= 2


def test_a_flat_picture_has_no_lines() -> None:
    flat = np.full((64, 64, 3), 90, np.uint8)

    assert not any(process(name, flat).any() for name in ("canny", "scribble", "lineart"))


def test_raw_is_the_picture_itself() -> None:
    assert np.array_equal(process("raw", square()), square())


def test_an_unknown_name_names_the_closest() -> None:
    with pytest.raises(UserError, match=r'no preprocessor "cany".*closest is "canny".*Known: raw, canny'):
        process("cany", square())

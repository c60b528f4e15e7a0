"""Pictures as people have them: rotated, animated, 16-bit, CMYK, transparent, broken, far too large."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.app.pictures import MAX_PIXELS, extend_border, fit_picture, open_mask, open_picture
from shared.quant.errors import UserError


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, width // 2, height))
    return image


def test_a_photo_lying_on_its_side_is_put_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn 90 degrees clockwise to view
    path = save(tmp_path / "photo.png", halves(), exif=exif)

    image = open_picture(path, "the picture").image

    assert image.size == (20, 40)
    assert image.getpixel((10, 5)) == (255, 0, 0)
    assert image.getpixel((10, 35)) == (0, 0, 255)


def test_the_first_frame_of_an_animation_is_used_and_said(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    path = save(tmp_path / "moving.gif", red, save_all=True, append_images=[blue, red])

    given = open_picture(path, "the picture")

    assert given.image.getpixel((4, 4)) == (255, 0, 0)
    assert given.notes == ("the picture is an animation of 3 frames; the first is used",)


def test_16_bits_keep_their_shades(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).repeat(4).reshape(4, -1, order="F")
    path = save(tmp_path / "deep.png", Image.fromarray(ramp))

    image = open_picture(path, "the picture").image

    assert np.asarray(image)[0, :, 0].tolist() == list(range(256))


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "LA", "RGBA", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / "any.tiff", Image.new("RGB", (6, 4), "white").convert(mode))

    image = open_picture(path, "the picture").image

    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert image.getpixel((3, 2)) == (255, 255, 255)


def test_what_is_transparent_turns_white(tmp_path: Path) -> None:
    path = save(tmp_path / "clear.png", Image.new("RGBA", (4, 4), (0, 0, 0, 0)))

    assert open_picture(path, "the picture").image.getpixel((1, 1)) == (255, 255, 255)


def test_50_megapixels_are_read(tmp_path: Path) -> None:
    path = save(tmp_path / "camera.png", Image.new("1", (8660, 5774)), compress_level=1)

    assert open_picture(path, "the picture").image.size == (8660, 5774)


def test_more_pixels_than_allowed_are_refused_by_the_header_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "huge.png", Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)), compress_level=1)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("the pixels were read"))

    with pytest.raises(UserError, match=r"huge\.png: the picture has 10000x8001 pixels, 80 million; at most 80"):
        open_picture(path, "the picture")


@pytest.mark.parametrize(
    ("content", "says"), [(b"not a picture", "not a readable picture"), (None, "the control picture is not there")]
)
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "odd.png"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UserError, match=rf"odd\.png.*{says}"):
        open_picture(path, "the control picture")


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "cut.png", Image.effect_noise((64, 64), 50))
    path.write_bytes(path.read_bytes()[:-800])

    with pytest.raises(UserError, match=r"cut\.png.*not a readable picture"):
        open_picture(path, "the picture")


# ------------------------------------------------------------------------------------------------ masks


def test_a_mask_is_black_and_white_only(tmp_path: Path) -> None:
    levels = np.array([[0, 100, 127, 128, 200, 255]], np.uint8)
    path = save(tmp_path / "mask.png", Image.fromarray(levels))

    assert np.asarray(open_mask(path, (6, 1)).image).tolist() == [[0, 0, 0, 255, 255, 255]]


def test_a_mask_of_another_size_and_the_same_shape_is_resized_and_said(tmp_path: Path) -> None:
    path = save(tmp_path / "mask.png", halves().getchannel("R"))

    given = open_mask(path, (400, 200))

    assert given.image.size == (400, 200)
    assert np.asarray(given.image)[:, :190].all()
    assert not np.asarray(given.image)[:, 210:].any()
    assert given.notes == ("the mask is 40x20 and is resized to the picture's 400x200",)


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "mask.png", halves())

    with pytest.raises(UserError, match=r"mask\.png: the mask is 40x20, the picture 30x30: of another shape"):
        open_mask(path, (30, 30))


def test_an_empty_mask_is_refused_and_a_full_one_said(tmp_path: Path) -> None:
    empty = save(tmp_path / "empty.png", Image.new("L", (8, 8)))
    full = save(tmp_path / "full.png", Image.new("L", (8, 8), 255))

    with pytest.raises(UserError, match=r"empty\.png: the mask is all black.*White marks"):
        open_mask(empty, (8, 8))
    assert open_mask(full, (8, 8)).notes == ("the mask is all white: the whole picture is repainted",)


def test_a_painted_layer_counts_by_its_opacity(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    layer.paste((20, 20, 20, 255), (0, 0, 4, 8))
    path = save(tmp_path / "layer.png", layer)

    assert np.asarray(open_mask(path, (8, 8)).image)[0].tolist() == [255] * 4 + [0] * 4


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_every_fit_gives_the_size(fit: str) -> None:
    assert fit_picture(halves(40, 20), (32, 48), fit).size == (32, 48)


def test_crop_keeps_the_middle_pad_keeps_all_stretch_distorts() -> None:
    picture = halves(40, 10)

    crop, pad, stretch = (np.asarray(fit_picture(picture, (20, 20), fit)) for fit in ("crop", "pad", "stretch"))

    assert crop[:, 5, 0].min() > 200  # red to the left of the middle
    assert crop[:, 15, 2].min() > 200
    assert (pad[0] == pad[7]).all()  # the border goes on above the picture
    assert pad[0, 0, 0] > 200
    assert stretch[0, 5, 0] > 200


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    picture = halves()

    assert fit_picture(picture, picture.size, "crop") is picture


def test_margins_continue_the_border() -> None:
    grown = extend_border(halves(), 3, 2, 5, 1)

    assert grown.size == (48, 23)
    assert grown.getpixel((0, 0)) == (255, 0, 0)
    assert grown.getpixel((47, 22)) == (0, 0, 255)

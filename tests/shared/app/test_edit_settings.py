"""The settings that draw from pictures: read back as written, and every contradiction named."""

from __future__ import annotations

from typing import Any

import pytest

from shared.app.edit_settings import EditSettings, parse_control, parse_margins
from shared.quant.errors import UserError


def test_nothing_given_is_nothing_recorded() -> None:
    assert EditSettings.build({}) == EditSettings()
    assert EditSettings().as_record() == {}


def test_a_record_reads_back_as_the_same_settings() -> None:
    edit = EditSettings.build(
        {
            "image_start": "a.png", "image_mask": "m.png", "image_guide": "c.png", "control_preprocessor": "canny",
            "control_start": 0.1, "control_end": 0.7, "image_refs": ["r.png", "s.png"],
            "mask_expand": 3, "mask_feather": 0, "inpaint_area": "whole",
        }
    )  # fmt: skip

    assert EditSettings.build(edit.as_record()) == edit


@pytest.mark.parametrize(
    ("preprocessor", "mask", "letters"), [("canny", "", "EV"), ("raw", "", "V"), ("scribble", "m.png", "SVA")]
)
def test_records_carry_wan2gps_letters(preprocessor: str, mask: str, letters: str) -> None:
    edit = EditSettings(image_start="a.png", image_guide="c.png", control_preprocessor=preprocessor, image_mask=mask)

    assert edit.as_record()["video_prompt_type"] == letters


@pytest.mark.parametrize(
    ("letters", "name"), [("EV", "canny"), ("CV", "gray"), ("V", "raw"), ("PV", "pose"), ("DV", "depth"), ("UV", "raw")]
)
def test_wan2gps_letters_choose_the_preprocessor(letters: str, name: str) -> None:
    assert EditSettings.build({"image_guide": "c.png", "video_prompt_type": letters}).control_preprocessor == name


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"image_mask": "m.png"}, '"image_mask" needs a picture'),
        ({"outpaint": "left=8"}, '"outpaint" needs a picture'),
        ({"tile_scale": 2}, '"tile_scale" needs a picture'),
        ({"control_start": 0.6, "control_end": 0.5}, '"control_start" 0.6 is not before "control_end" 0.5'),
        ({"control_end": 1.5}, '"control_end" must be from 0 to 1, got 1.5'),
        ({"control_start": -0.1}, '"control_start" must be from 0 to 1, got -0.1'),
        ({"mask_feather": -1}, '"mask_feather" must be from 0 to 1024'),
        ({"image_fit": "padd"}, 'one of crop, pad, stretch, got "padd".*closest is "pad"'),
        ({"inpaint_area": "mask"}, 'closest is "masked"'),
        ({"control_preprocessor": "cany"}, 'no preprocessor "cany".*closest is "canny"'),
        ({"image_start": "a.png", "tile_scale": 2, "outpaint": "all=8"}, '"tile_scale" does not go with'),
        ({"image_start": "a.png", "hires_scale": 2, "image_mask": "m.png"}, '"hires_scale" does not go with'),
    ],
)
def test_contradictions_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        EditSettings.build(values)


@pytest.mark.parametrize(
    ("text", "margins"),
    [("", (0, 0, 0, 0)), ("left=128,bottom=64", (128, 0, 0, 64)), (" all=8 , top = 16", (8, 16, 8, 8))],
)
def test_margins_are_read_by_side(text: str, margins: tuple[int, ...]) -> None:
    assert parse_margins(text) == margins


@pytest.mark.parametrize(
    ("text", "says"),
    [("128", '"128" is not of the form SIDE=PIXELS'), ("lefft=8", 'closest is "left"'), ("top=9999", "too many")],
)
def test_margins_that_cannot_be_read_are_named(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_margins(text)


@pytest.mark.parametrize(
    ("text", "file", "name"),
    [
        ("a.png:canny", "a.png", "canny"),
        ("a.png", "a.png", "raw"),
        (r"C:\pictures\a.png", r"C:\pictures\a.png", "raw"),
        (r"C:\a.png:tile", r"C:\a.png", "tile"),
        ("./odd:name/a.png", "./odd:name/a.png", "raw"),
    ],
)
def test_a_control_picture_may_name_its_preprocessor(text: str, file: str, name: str) -> None:
    assert parse_control(text) == (file, name)


def test_a_misspelt_preprocessor_is_told() -> None:
    with pytest.raises(UserError, match='closest is "scribble"'):
        parse_control("a.png:scrible")

"""What the model is shown, and how the result is put together: without a model, by drawing flat green."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared.app.edit_settings import EditSettings
from shared.app.editing import Edit, Pass, open_edit
from shared.app.settings import GenerationSettings
from shared.quant.errors import UserError

GREEN = (0, 255, 0)
CONTROL_MODEL = {"guide_preprocessing": {"selection": ["V"]}}
OMNI_MODEL = {"image_ref_choices": {"choices": [("Reference Pictures", "I")]}}


def noise_picture(width: int, height: int, seed: int = 1) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 200, (height, width, 3), np.uint8))


def a_mask(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


class Studio:
    """A folder of pictures, and drawings in flat green of what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[Pass] = []

    def put(self, name: str, image: Image.Image) -> str:
        image.save(self.folder / name)
        return str(self.folder / name)

    def open(self, *, size: tuple[int, int] = (64, 64), strength: float = 1.0, model: Any = None, **edit: Any) -> Edit:
        settings = GenerationSettings(
            prompt="x", seed=1, width=size[0], height=size[1], denoising_strength=strength, edit=EditSettings(**edit)
        )
        return open_edit(settings, model or {}, self.folder)

    def draw(self, asked: Pass) -> Image.Image:
        self.asked.append(asked)
        return Image.new("RGB", (asked.width, asked.height), GREEN)


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


def green_share(image: Image.Image) -> np.ndarray:
    return (np.asarray(image) == GREEN).all(axis=2)


def test_without_pictures_one_drawing_from_nothing(studio: Studio) -> None:
    edit = studio.open()

    edit.draw(studio.draw)

    (asked,) = studio.asked
    assert asked.host_kwargs() == {"width": 64, "height": 64, "denoising_strength": 1.0}
    assert (edit.passes, edit.notes, edit.sources) == (1, (), {})


def test_image_to_image_fits_the_picture_and_passes_the_strength(studio: Studio) -> None:
    path = studio.put("a.png", noise_picture(200, 100))

    studio.open(image_start=path, strength=0.4, size=(64, 32)).draw(studio.draw)

    (asked,) = studio.asked
    assert asked.start is not None
    assert asked.start.size == (64, 32)
    assert asked.strength == 0.4
    assert asked.mask is None


def test_levels_survive_the_way_to_the_model_exactly(studio: Studio) -> None:
    picture = noise_picture(16, 16)

    tensor = Pass(width=16, height=16, start=picture).host_kwargs()["image_start"]

    assert torch.equal(((tensor + 1) * 127.5).round().permute(1, 2, 0).byte(), torch.from_numpy(np.array(picture)))


# ------------------------------------------------------------------------------------------------ inpainting


@pytest.mark.parametrize("area", ["masked", "whole"])
def test_pixels_outside_the_mask_are_the_given_ones_bit_for_bit(studio: Studio, area: str) -> None:
    picture, mask = noise_picture(300, 200), a_mask(300, 200, (50, 60, 90, 100))
    edit = studio.open(
        image_start=studio.put("a.png", picture), image_mask=studio.put("m.png", mask), mask_feather=0,
        inpaint_area=area,
    )  # fmt: skip

    result = edit.draw(studio.draw)

    inside = np.asarray(mask) > 0
    assert result.size == (300, 200)
    assert np.array_equal(np.asarray(result)[~inside], np.asarray(picture)[~inside])
    assert green_share(result)[inside].all()


def test_a_feathered_mask_fades_out_over_its_width_and_no_further(studio: Studio) -> None:
    picture, mask = noise_picture(128, 128), a_mask(128, 128, (48, 48, 80, 80))
    edit = studio.open(
        image_start=studio.put("a.png", picture), image_mask=studio.put("m.png", mask), mask_expand=4, mask_feather=8,
    )  # fmt: skip

    result = edit.draw(studio.draw)

    assert green_share(result)[44:84, 48:80].all()  # grown by 4
    greens = np.asarray(result)[64, 30:48, 1].astype(int) - np.asarray(picture)[64, 30:48, 1]
    assert (greens[6:14] > 0).all()  # 8 pixels of fading left of the grown mask
    assert np.array_equal(np.asarray(result)[:, :36], np.asarray(picture)[:, :36])


def test_a_mask_can_shrink_but_not_to_nothing(studio: Studio) -> None:
    picture, mask = noise_picture(64, 64), a_mask(64, 64, (0, 16, 32, 48))
    paths = {"image_start": studio.put("a.png", picture), "image_mask": studio.put("m.png", mask), "mask_feather": 0}

    result = studio.open(mask_expand=-4, **paths).draw(studio.draw)

    assert green_share(result)[20:44, 4:28].all()
    assert green_share(result).sum() == 24 * 24
    with pytest.raises(UserError, match="leaves nothing of the mask"):
        studio.open(mask_expand=-20, **paths).draw(studio.draw)


def test_a_small_mask_is_drawn_from_its_surroundings_at_the_chosen_resolution(studio: Studio) -> None:
    picture, mask = noise_picture(1000, 800), a_mask(1000, 800, (900, 700, 960, 760))
    edit = studio.open(image_start=studio.put("a.png", picture), image_mask=studio.put("m.png", mask), size=(256, 256))

    edit.draw(studio.draw)

    (asked,) = studio.asked
    assert (asked.width, asked.height) == (256, 256)
    assert asked.mask is not None
    share = np.asarray(asked.mask).astype(bool).mean()
    assert 0.15 < share < 0.6  # enlarged, with context around it


def test_the_model_may_draw_wherever_the_fading_shows(studio: Studio) -> None:
    picture, mask = noise_picture(64, 64), a_mask(64, 64, (30, 30, 34, 34))
    edit = studio.open(
        image_start=studio.put("a.png", picture), image_mask=studio.put("m.png", mask), inpaint_area="whole",
    )  # fmt: skip

    result = edit.draw(studio.draw)

    changed = (np.asarray(result) != np.asarray(picture)).any(axis=2)
    assert not (changed & (np.asarray(studio.asked[0].mask) == 0)).any()


def test_outpainting_adds_the_margins_and_keeps_the_picture(studio: Studio) -> None:
    picture = noise_picture(96, 64)
    edit = studio.open(image_start=studio.put("a.png", picture), outpaint="left=32,bottom=16", mask_feather=0)

    result = edit.draw(studio.draw)

    assert result.size == (128, 80)
    assert np.array_equal(np.asarray(result)[:64, 32:], np.asarray(picture))
    assert green_share(result)[:, :32].all()
    assert green_share(result)[64:].all()


# ------------------------------------------------------------------------------------------------ further passes


def test_a_second_pass_draws_from_the_enlarged_first_one(studio: Studio) -> None:
    edit = studio.open(hires_scale=1.5, hires_strength=0.3, size=(64, 32))

    result = edit.draw(studio.draw)

    first, second = studio.asked
    assert first.start is None
    assert (second.width, second.height, second.strength) == (96, 48, 0.3)
    assert second.start is not None
    assert second.start.getpixel((0, 0)) == GREEN
    assert (edit.passes, result.size) == (2, (96, 48))


def test_tiles_cover_the_enlarged_picture_and_join_without_a_seam(studio: Studio) -> None:
    picture = Image.new("RGB", (160, 112), (90, 120, 30))
    edit = studio.open(image_start=studio.put("a.png", picture), tile_scale=2, strength=0.4, size=(128, 128))

    result = edit.draw(lambda asked: studio.draw(asked) and asked.start)  # type: ignore[arg-type,return-value]

    assert result.size == (320, 224)
    assert len({asked.seed for asked in studio.asked}) == len(studio.asked) == edit.passes
    assert {(asked.width, asked.height) for asked in studio.asked} == {(128, 128)}
    assert (np.asarray(result) == (90, 120, 30)).all()


def test_tiles_show_the_control_branch_what_they_start_from(studio: Studio) -> None:
    path = studio.put("a.png", noise_picture(64, 64))

    studio.open(image_start=path, tile_scale=2, model=CONTROL_MODEL, control_preprocessor="gray").draw(studio.draw)

    assert all(asked.control is not None and asked.control.size == (64, 64) for asked in studio.asked)
    assert np.ptp(np.asarray(studio.asked[0].control), axis=2).max() == 0


# ------------------------------------------------------------------------------------------------ control


def test_the_preview_is_what_the_model_sees(studio: Studio) -> None:
    edit = studio.open(
        image_guide=studio.put("c.png", noise_picture(50, 80)), control_preprocessor="canny", model=CONTROL_MODEL
    )

    edit.draw(studio.draw)

    control = studio.asked[0].control
    assert control is not None
    assert np.array_equal(np.asarray(edit.control_preview()), np.asarray(control))
    assert set(np.unique(np.asarray(control))) == {0, 255}
    assert studio.asked[0].host_kwargs()["input_frames"].shape == (3, 1, 64, 64)


def test_a_control_picture_over_the_given_one_is_cut_out_with_it(studio: Studio) -> None:
    picture, mask = noise_picture(400, 400), a_mask(400, 400, (300, 300, 340, 340))
    edit = studio.open(
        image_start=studio.put("a.png", picture), image_mask=studio.put("m.png", mask),
        image_guide=studio.put("c.png", picture), model=CONTROL_MODEL,
    )  # fmt: skip

    edit.draw(studio.draw)

    (asked,) = studio.asked
    assert np.array_equal(np.asarray(asked.control), np.asarray(asked.start))


def test_a_control_window_reaches_the_model(studio: Studio) -> None:
    path = studio.put("c.png", noise_picture(8, 8))

    studio.open(image_guide=path, control_start=0.2, control_end=0.6, model=CONTROL_MODEL).draw(studio.draw)

    keywords = studio.asked[0].host_kwargs()
    assert (keywords["control_start"], keywords["control_end"]) == (0.2, 0.6)


def test_references_reach_every_drawing_as_they_are(studio: Studio) -> None:
    pictures = [noise_picture(50, 80, seed=1), noise_picture(30, 20, seed=2)]
    paths = tuple(studio.put(f"{i}.png", picture) for i, picture in enumerate(pictures))

    edit = studio.open(image_refs=paths, hires_scale=2.0, model=OMNI_MODEL)
    edit.draw(studio.draw)

    assert len(studio.asked) == 2
    for asked in studio.asked:
        shown = [np.asarray(image) for image in asked.host_kwargs()["input_ref_images"]]
        assert all(np.array_equal(one, np.asarray(given)) for one, given in zip(shown, pictures, strict=True))
    assert edit.prompt_kwargs["input_ref_images"] == list(edit.references)


def test_a_reference_that_is_not_there_is_named(studio: Studio) -> None:
    path = studio.put("a.png", noise_picture(8, 8))

    with pytest.raises(UserError, match=r"gone\.png: reference picture 2 is not there"):
        studio.open(image_refs=(path, "gone.png"), model=OMNI_MODEL)


def test_no_control_picture_is_no_preview(studio: Studio) -> None:
    with pytest.raises(UserError, match="no control picture to preview"):
        studio.open().control_preview()


# ------------------------------------------------------------------------------------------------ told before loading


def test_a_control_picture_needs_a_preset_with_a_controlnet(studio: Studio) -> None:
    with pytest.raises(UserError, match=r"no ControlNet.*z_image_control2_1"):
        studio.open(image_guide=studio.put("c.png", noise_picture(8, 8)))


def test_references_need_a_preset_for_a_model_that_looks_at_them(studio: Studio) -> None:
    with pytest.raises(UserError, match=r"does not look at reference pictures.*z_image_omni"):
        studio.open(image_refs=(studio.put("r.png", noise_picture(8, 8)),), model=CONTROL_MODEL)


def test_strength_1_is_said_and_for_tiles_refused(studio: Studio) -> None:
    path = studio.put("a.png", noise_picture(8, 8))

    assert "nothing of the picture will show" in studio.open(image_start=path).notes[0]
    with pytest.raises(UserError, match="every tile would be drawn from nothing"):
        studio.open(image_start=path, tile_scale=2)


def test_given_pictures_are_kept_by_their_content_and_found_again(studio: Studio, tmp_path: Path) -> None:
    path = studio.put("private_name.png", noise_picture(64, 64))
    edit = studio.open(image_start=path, strength=0.5)
    outputs = tmp_path / "outputs"

    names = edit.keep_sources(outputs)
    again = open_edit(
        GenerationSettings(prompt="x", seed=1, edit=EditSettings(image_start=names["image_start"])), {}, outputs
    )

    assert names["image_start"].startswith("inputs/")
    assert "private_name" not in names["image_start"]
    assert edit.keep_sources(outputs) == names
    assert again.hashes == edit.hashes

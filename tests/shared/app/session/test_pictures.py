"""Pictures of a batch, one by one: their seeds, records and names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.app.context import AppContext
from shared.app.metadata import read_record
from shared.app.one_picture import to_image
from shared.app.settings import GenerationSettings
from tests.support.fake_family import FakeHandler
from tests.support.orders import order, pixels


def test_a_batch_is_drawn_one_by_one_each_with_its_own_seed(ctx: AppContext, handler: FakeHandler) -> None:
    result = ctx.session.generate("one", order(ctx, batch_size=3))

    assert [(call["seed"], call["batch_size"]) for call in handler.processors[0].calls] == [(40, 1), (41, 1), (42, 1)]
    assert [image.seed for image in result.images] == [40, 41, 42]
    assert [image.path.exists() for image in result.images] == [True] * 3


def test_every_picture_can_be_drawn_again_alone_from_its_own_record(ctx: AppContext) -> None:
    second = ctx.session.generate("one", order(ctx, batch_size=2)).images[1]

    record = read_record(second.path)
    restored = GenerationSettings.build(ctx.presets.get("one"), record)
    again = ctx.session.generate("one", restored).images[0]

    assert restored.notes == ()
    assert again.seed == 41
    assert np.array_equal(pixels(again.path), pixels(second.path))


def test_the_record_inside_the_picture_is_the_one_in_the_event(ctx: AppContext) -> None:
    image = ctx.session.generate("one", order(ctx)).images[0]

    assert read_record(image.path) == image.record
    assert "WanGP" in image.record["type"]
    assert image.record["resolution"] == "64x48"
    assert image.record["model_type"] == "one"
    assert image.record["base_model_type"] == "fake"
    assert image.record["model_filename"] == "transformer.safetensors"


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_the_record_says_in_which_precision_it_was_drawn(ctx: AppContext, precision: str) -> None:
    image = ctx.session.generate("one", order(ctx, precision=precision)).images[0]

    assert image.record["provenance"]["precision"] == precision
    assert image.record.get("precision", "fast") == precision  # drawn again from the record it is the same


def test_the_record_names_the_weights_by_hash_and_no_folder_of_this_machine(ctx: AppContext, tmp_path: Path) -> None:
    result = ctx.session.generate("one", order(ctx))

    in_record = result.images[0].record["provenance"]["files"]
    assert [file["name"] for file in in_record] == [Path(file["path"]).name for file in result.files]
    assert [file["sha256"] for file in in_record] == [file["sha256"] for file in result.files]
    assert str(tmp_path) not in json.dumps(result.images[0].record)


def test_pixels_are_rounded_to_the_nearest_of_256_levels() -> None:
    levels = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 7.0]).expand(3, 1, 1, 6)

    assert np.asarray(to_image(levels))[0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]


def test_names_hold_date_seed_and_words_of_the_prompt(ctx: AppContext) -> None:
    name = ctx.session.generate("one", order(ctx)).images[0].path.name

    assert name.endswith("_seed40_a-red-fox.png")
    assert name[4] == name[7] == name[10] == "-" and name[13] == "h" and name[16] == "m" and name[19] == "s"

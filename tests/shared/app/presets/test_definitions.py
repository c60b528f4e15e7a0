"""Presets take parts of one another, and a reference that cannot be followed is told."""

import pytest

from shared.app.presets import LoraChoice
from shared.quant.errors import UserError
from tests.support.preset_folders import HUB, QWEN


def test_a_control_preset_takes_its_weights_by_id_and_brings_a_module(folders):
    folders.default("z_image")
    module = [f"{HUB}Union_bf16.safetensors", f"{HUB}Union_quanto_bf16_int8.safetensors"]
    folders.default(
        "z_image_control",
        {"architecture": "z_image_control", "URLs": "z_image", "modules": [module]},
        num_inference_steps=9,
        control_net_weight_alt=0.75,
    )

    preset = folders.load().get("z_image_control")

    assert preset.urls == (f"{HUB}z_image_bf16.safetensors",)
    assert preset.modules == (tuple(module),)
    assert preset.settings["control_net_weight"] == 0.75
    assert preset.settings["control_net_weight_alt"] == 0.75
    assert preset.notes == ()


def test_every_list_can_be_inherited_through_several_presets(folders):
    folders.default(
        "first",
        {
            "modules": [["m.safetensors"]],
            "text_encoder_URLs": ["te.safetensors"],
            "VAE_URLs": ["vae.safetensors"],
            "preload_URLs": [f"{HUB}map.json|maps"],
            "loras": ["a.safetensors", "b.safetensors"],
            "loras_multipliers": [0.5],
        },
    )
    keys = (
        "URLs",
        "modules",
        "text_encoder_URLs",
        "VAE_URLs",
        "preload_URLs",
        "loras",
        "loras_multipliers",
    )
    folders.default("second", dict.fromkeys(keys, "first"))
    folders.finetune("third", dict.fromkeys(keys, "second"))

    preset = folders.load().get("third")

    assert preset.urls == (f"{HUB}first_bf16.safetensors",)
    assert preset.modules == (("m.safetensors",),)
    assert preset.text_encoder_urls == ("te.safetensors",)
    assert preset.vae_urls == ("vae.safetensors",)
    assert preset.preload_urls == (f"{HUB}map.json|maps",)
    assert preset.loras == (LoraChoice("a.safetensors", "0.5"), LoraChoice("b.safetensors", "1"))


def test_the_text_encoder_of_another_preset_may_be_the_families_own(folders):
    folders.default("z_image")
    folders.default("other", {"text_encoder_URLs": "z_image"})

    assert folders.load().get("other").text_encoder_urls == (
        f"{QWEN}qwen3_bf16.safetensors",
        f"{QWEN}qwen3_quanto_bf16_int8.safetensors",
    )


def test_modules_can_be_single_ones_of_other_presets(folders):
    folders.default("control", {"modules": [["union.safetensors"]]})
    folders.default("named", {"modules": {"tile": ["tile.safetensors"], "lite": "control"}, "visible": False})
    wanted = ["control", "named#tile", {"URLs": ["third.safetensors"]}, "named#lite"]
    folders.finetune("mix", {"modules": wanted})

    collection = folders.load()

    assert collection.problems == []
    assert collection.get("named").modules == ()  # it only lends them
    assert collection.get("mix").modules == (
        ("union.safetensors",),
        ("tile.safetensors",),
        ("third.safetensors",),
        ("union.safetensors",),
    )


def test_a_circle_of_references_is_told_as_a_circle(folders):
    folders.default("z_image")
    folders.finetune("a", {"URLs": "b"})
    folders.finetune("b", {"URLs": "a"})

    collection = folders.load()

    assert list(collection.presets) == ["z_image"]
    assert '"URLs" refers to itself: a -> b -> a' in collection.problems[0]
    with pytest.raises(UserError, match="refers to"):
        collection.get("a")


def test_an_override_that_closes_a_circle_through_defaults_is_the_one_left_out(folders):
    folders.default("z_image")
    folders.default("z_image_control", {"URLs": "z_image"})
    folders.finetune("z_image", {"URLs": "z_image_control"})

    collection = folders.load()

    assert set(collection.presets) == {"z_image", "z_image_control"}
    assert len(collection.problems) == 1


def test_an_override_that_breaks_a_default_which_refers_to_it_is_the_one_left_out(folders):
    folders.default("control", {"modules": [["union.safetensors"]]})
    borrower = folders.default("tile", {"modules": ["control"]})
    override = folders.finetune("control", {"modules": [["one.safetensors"], ["two.safetensors"]]})

    collection = folders.load()

    assert collection.get("tile").modules == (("union.safetensors",),)
    assert collection.problems == [
        f'{override}: with this file, {borrower}: "modules" asks for "control", but "control" has a list of 2. '
        "This file is left out."
    ]

"""Settings built from a preset, what was saved and what is asked for; written and read back."""

import json

import pytest

from shared.app.presets import LoraChoice
from shared.app.settings import loras_as_host_settings, parse_lora
from shared.quant.errors import UserError
from tests.support.built_settings import build, make_preset


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    return make_preset(tmp_path_factory.mktemp("turbo"), {"architecture": "z_image"})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_preset(tmp_path_factory.mktemp("base"), {"architecture": "z_image_base"})


EVERYTHING = {
    "prompt": "a lighthouse",
    "negative_prompt": "fog",
    "resolution": "768x512",
    "num_inference_steps": 12,
    "guidance_scale": 2.5,
    "seed": 7,
    "batch_size": 2,
    "sample_solver": "euler",
    "denoising_strength": 0.5,
    "control_net_weight": 0.6,
    "activated_loras": ["a.sft"],
    "loras_multipliers": "0.8",
    "VAE_tile_size": 32,
    "cfg_normalization": True,
    "cfg_truncation": 0.9,
    "film_grain_intensity": 0.1,
}


def test_what_is_asked_for_beats_what_was_saved_beats_the_preset(base):
    saved = {"num_inference_steps": 12, "guidance_scale": 2.5}

    settings = build(base, saved, guidance_scale=7)

    assert (settings.guidance_scale, settings.num_inference_steps, settings.flow_shift) == (7.0, 12, 6.0)


def test_null_means_not_set_at_every_level(base):
    settings = build(base, {"num_inference_steps": None, "guidance_scale": 2}, guidance_scale=None)

    assert (settings.num_inference_steps, settings.guidance_scale) == (30, 2.0)


def test_values_typed_as_text_are_read(base):
    typed = {"num_inference_steps": "12", "guidance_scale": "2.5", "seed": "18014398509481985", "batch_size": "2"}

    settings = build(base, {}, **typed)

    assert (settings.num_inference_steps, settings.guidance_scale, settings.batch_size) == (12, 2.5, 2)
    assert settings.seed == 18014398509481985  # beyond what a float can hold


def test_a_seed_of_minus_one_is_drawn_and_kept(turbo):
    first, second = build(turbo, seed=-1), build(turbo)

    assert 0 <= first.seed < 2**31
    assert first.seed != second.seed
    assert build(turbo, first.as_record()).seed == first.seed


def test_an_image_of_a_batch_has_its_own_seed_and_stands_alone(turbo):
    batch = build(turbo, seed=40, batch_size=3)

    assert [batch.for_image(i).seed for i in range(3)] == [40, 41, 42]
    assert batch.for_image(2) == build(turbo, seed=42)


def test_wan2gps_other_settings_are_carried_along(turbo):
    settings = build(turbo, {"film_grain_intensity": 0.2, "image_guide": None}, spatial_upsampling="lanczos2")

    assert settings.extra == {"image_mode": 1, "film_grain_intensity": 0.2, "spatial_upsampling": "lanczos2"}
    assert settings.as_record()["film_grain_intensity"] == 0.2
    assert settings.notes == ('"spatial_upsampling" is a setting of Wan2GP without effect here.',)


def test_facts_about_a_saved_picture_are_no_settings(turbo):
    record = {"type": "WanGP v12.60", "model_type": "z_image", "generation_time": 3, "creation_date": "2026-08-21"}

    settings = build(turbo, record)

    assert settings.extra == {"image_mode": 1}
    assert settings.notes == ()


def test_an_unknown_saved_key_is_noted_and_dropped(turbo):
    settings = build(turbo, {"prompts": "a cat"})

    assert settings.notes == ('saved settings: unknown key "prompts", the closest is "prompt".',)
    assert settings.prompt == ""


def test_a_config_is_kept_and_an_unknown_one_is_told(tmp_path):
    preset = make_preset(tmp_path, {"architecture": "z_image", "configs": {"other": {"VAE_URLs": ["v.sft"]}}})

    settings = build(preset, config=",,,other")

    assert (settings.extra["config"], settings.notes) == (",,,other", ())
    assert build(preset, {"config": "gone"}).extra["config"] == "gone"  # a saved choice may outlive the set
    with pytest.raises(UserError, match=r'"config" "oter" \(text\) is not among those of test. Known: other.'):
        build(preset, config="oter")


@pytest.mark.parametrize(
    ("multipliers", "expected"),
    [
        ("", ["1", "1"]),
        ("0.8", ["0.8", "1"]),
        ("0.8 0.5", ["0.8", "0.5"]),
        ("# first style, then face\n0.8\n0.5", ["0.8", "0.5"]),
        ("1|0.5", ["1", "0.5"]),
        ("1,0.5 0;1", ["1,0.5", "0;1"]),
        ([0.8, "0.5"], ["0.8", "0.5"]),
    ],
)
def test_loras_are_paired_with_their_strengths(turbo, multipliers, expected):
    settings = build(turbo, activated_loras=["a.safetensors", "b.safetensors"], loras_multipliers=multipliers)

    assert settings.loras == (LoraChoice("a.safetensors", expected[0]), LoraChoice("b.safetensors", expected[1]))


def test_a_strength_that_is_no_number_is_told(turbo):
    with pytest.raises(UserError, match=r'The LoRA strength "strong" is no number'):
        build(turbo, activated_loras=["a.safetensors"], loras_multipliers="strong")


def test_more_strengths_than_loras_are_noted(turbo):
    settings = build(turbo, activated_loras=["a.safetensors"], loras_multipliers="1 2 3")

    assert settings.notes == ('"loras_multipliers" has 2 more than there are LoRAs; they are not used.',)


def test_strengths_for_some_loras_only_are_noted(turbo):
    settings = build(turbo, activated_loras=["a.safetensors", "b.sft", "c.sft"], loras_multipliers="0.5")

    assert settings.notes == ('"loras_multipliers" has 2 fewer than there are LoRAs; the last ones get 1.',)


@pytest.mark.parametrize(
    ("typed", "choice"),
    [
        ("a.safetensors", LoraChoice("a.safetensors", "1")),
        ("a.safetensors:0.8", LoraChoice("a.safetensors", "0.8")),
        ("C:\\loras\\a.sft", LoraChoice("C:\\loras\\a.sft", "1")),
        ("C:\\loras\\a.sft:-0.5", LoraChoice("C:\\loras\\a.sft", "-0.5")),
        ("https://host:8080/a.sft", LoraChoice("https://host:8080/a.sft", "1")),
        ("https://host/a.sft:1,0.2", LoraChoice("https://host/a.sft", "1,0.2")),
        ("a.sft:nan", LoraChoice("a.sft:nan", "1")),
    ],
)
def test_a_typed_lora_is_a_file_and_perhaps_a_strength(typed, choice):
    assert parse_lora(typed) == choice


def test_typed_loras_reach_the_settings_through_the_hosts_keys(turbo):
    choices = (parse_lora("a.sft:0.8"), parse_lora("b.sft"))

    assert build(turbo, **loras_as_host_settings(choices)).loras == choices


@pytest.mark.parametrize("which", ["turbo", "base"])
def test_a_record_gives_the_same_settings_back(which, request):
    preset = request.getfixturevalue(which)
    own = {"NAG_scale": 3.0} if which == "turbo" else {"flow_shift": 4.5}
    settings = build(preset, EVERYTHING | own)

    record = json.loads(json.dumps(settings.as_record()))

    assert build(preset, record) == settings


def test_a_record_wins_over_a_preset_with_other_defaults(tmp_path):
    preset = make_preset(
        tmp_path,
        {"architecture": "z_image"},
        negative_prompt="fog",
        NAG_scale=4,
        activated_loras=["a.sft"],
        control_net_weight=0.3,
    )
    plain = {"negative_prompt": "", "NAG_scale": 1, "activated_loras": [], "control_net_weight": 1.0, "seed": 1}
    settings = build(preset, plain)

    assert build(preset, settings.as_record()) == settings
    assert (settings.negative_prompt, settings.NAG_scale, settings.loras) == ("", 1.0, ())


def test_the_pipeline_gets_the_hosts_names(base):
    kwargs = build(base, prompt="a", negative_prompt="b", resolution="512x768", seed=3).host_kwargs()

    assert kwargs == {
        "input_prompt": "a",
        "n_prompt": "b",
        "seed": 3,
        "sampling_steps": 30,
        "sample_solver": "",
        "width": 512,
        "height": 768,
        "batch_size": 1,
        "guide_scale": 4.0,
        "shift": 6.0,
        "NAG_scale": 1.0,
        "NAG_tau": 3.5,
        "NAG_alpha": 0.5,
        "denoising_strength": 1.0,
        "context_scale": [1.0],
        "VAE_tile_size": None,
        "cfg_normalization": 0.0,
        "cfg_truncation": 1.0,
        "image_mode": 1,
        "schedule": "",
        "sigmas": (),
        "variation_strength": 0.0,
        "variation_seed": -1,
        "diversity": 0.0,
        "diversity_end": 0.25,
        "long_prompt": "keep",
        "precision": "fast",
        "step_cache": 0.0,
    }

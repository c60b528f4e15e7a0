"""Settings built from a preset, what was saved and what is asked for; checked; written and read back."""

import json
from pathlib import Path

import pytest

from shared.app.families import load_families
from shared.app.presets import LoraChoice, load_presets
from shared.app.setting_checks import parse_resolution
from shared.app.settings import GenerationSettings, loras_as_host_settings, parse_lora
from shared.quant.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    return make_preset(tmp_path_factory.mktemp("turbo"), {"architecture": "z_image"})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_preset(tmp_path_factory.mktemp("base"), {"architecture": "z_image_base"})


def make_preset(folder, model, **settings):
    model = {"name": "Test", "URLs": ["weights.safetensors"]} | model
    (folder / "test.json").write_text(json.dumps({"model": model, **settings}), encoding="utf-8")
    return load_presets([folder], load_families(ROOT / "models")).get("test")


def build(preset, saved=None, **overrides):
    return GenerationSettings.build(preset, saved or {}, overrides)


def test_a_prompt_of_bytes_that_are_no_text_is_refused_in_words(base):
    with pytest.raises(UserError, match='"prompt" has a character that is none, after "caf"'):
        build(base, {}, prompt="caf\udce9 au lait")


# ---- whose value counts


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


# ---- sizes


def test_a_resolution_is_two_sides(turbo):
    settings = build(turbo, resolution="1920x1088")

    assert (settings.width, settings.height) == (1920, 1088)
    assert parse_resolution(" 512 X 768 ") == (512, 768)


def test_a_size_off_the_grid_names_the_nearest_two(turbo):
    with pytest.raises(UserError) as error:
        build(turbo, resolution="1024x1000")

    assert error.value.message == '"resolution" 1024x1000: the height 1000 is not a multiple of 16.'
    assert error.value.hint == "The nearest two are 992 and 1008."


def test_the_grid_is_the_models_own(tmp_path):
    preset = make_preset(tmp_path, {"architecture": "z_image", "vae_block_size": 32}, resolution="512x512")

    with pytest.raises(UserError, match="the width 528 is not a multiple of 32"):
        build(preset, resolution="528x512")


@pytest.mark.parametrize("size", ["0x512", "512x8", "8208x512", "512", "512x", "wide", "-512x512", "1e3x512"])
def test_an_impossible_size_is_an_error(turbo, size):
    with pytest.raises(UserError, match='"resolution"'):
        build(turbo, resolution=size)


# ---- ranges and kinds


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_inference_steps", 0, "must be from 1 to 1000, got 0"),
        ("num_inference_steps", 8.5, "must be a whole number, got 8.5"),
        ("num_inference_steps", "eight", 'must be a whole number, got "eight" (text)'),
        ("guidance_scale", -1, "must be at least 0, got -1"),
        ("guidance_scale", "nan", "must be a number"),
        ("guidance_scale", "inf", "must be a number"),
        ("batch_size", 0, "must be from 1 to 16, got 0"),
        ("batch_size", 17, "must be from 1 to 16, got 17"),
        ("seed", -2, "must be from -1 to"),
        ("seed", 2**63, "must be from -1 to"),
        ("NAG_alpha", 1.5, "must be from 0 to 1, got 1.5"),
        ("denoising_strength", 2, "must be from 0 to 1, got 2"),
        ("cfg_truncation", -0.1, "must be from 0 to 1"),
        ("VAE_tile_size", 8, "must be 0 or at least 16 latent cells, got 8"),
        ("sample_solver", "heun9", 'or empty, got "heun9"'),
        ("prompt", 5, "must be text, got 5 (number)"),
        ("activated_loras", "a.safetensors", "must be a list of texts"),
        ("loras_multipliers", "strong", None),  # fine while there is no LoRA to apply it to
    ],
)
def test_a_value_out_of_range_is_told_with_what_is_allowed(turbo, key, value, words):
    if words is None:
        build(turbo, **{key: value})
        return
    with pytest.raises(UserError) as error:
        build(turbo, **{key: value})

    assert f'"{key}"' in error.value.message
    assert words in error.value.message


def test_the_last_seed_of_a_batch_must_fit_too(turbo):
    build(turbo, seed=2**63 - 1)
    with pytest.raises(UserError, match='"seed" must be from'):
        build(turbo, seed=2**63 - 1, batch_size=2)


def test_flow_shift_must_be_above_zero(base):
    with pytest.raises(UserError, match='"flow_shift" must be above 0, got 0'):
        build(base, flow_shift=0)


def test_a_misspelt_override_names_the_closest_key(turbo):
    with pytest.raises(UserError, match=r'there is no key "num_inference_step"\. The closest known key is'):
        build(turbo, num_inference_step=4)


# ---- what a model does not offer


def test_asking_for_nag_or_shift_where_there_is_none_is_an_error(turbo, base):
    with pytest.raises(UserError, match='"NAG_scale" cannot be set for test'):
        build(base, NAG_scale=4)
    with pytest.raises(UserError, match='"flow_shift" cannot be set for test'):
        build(turbo, flow_shift=5)


def test_saved_nag_and_shift_of_another_model_are_set_aside(turbo, base):
    assert build(turbo, {"flow_shift": 5}).flow_shift is None

    settings = build(base, {"NAG_scale": 4, "NAG_tau": 2})

    assert (settings.NAG_scale, settings.NAG_tau) == (1.0, 3.5)
    assert settings.notes == ('saved settings: "NAG_scale" has no effect, test does not offer NAG.',)


def test_nag_is_taken_where_it_is_offered(turbo):
    assert build(turbo, NAG_scale="4").NAG_scale == 4.0


# ---- foreign keys


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


# ---- LoRAs


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


# ---- written and read back


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


def test_an_unknown_sampler_lists_the_known_ones_and_the_closest(base):
    with pytest.raises(UserError, match=r'one of default, euler, heun, .*The closest is "dpmpp_2m"'):
        build(base, sample_solver="dpm_2m")


@pytest.mark.parametrize(
    ("asked", "steps"), [({"sigmas": [1, 0.5, 0.2]}, 3), ({"sample_solver": "unified_4s"}, 4), ({}, 9)]
)
def test_what_decides_the_steps_is_said(turbo, asked, steps):
    settings = build(turbo, num_inference_steps=9, **asked)

    assert settings.num_inference_steps == steps
    assert any(f"There are {steps} steps" in note for note in settings.notes) == bool(asked)


def test_the_unified_sampler_is_said_to_be_for_other_weights(turbo, tmp_path):
    twinflow = make_preset(tmp_path, {"architecture": "z_image", "unified_solver": True})

    assert "made for TwinFlow" in " ".join(build(turbo, sample_solver="unified_2s").notes)
    assert build(twinflow, sample_solver="unified_2s").notes == ()


def test_nag_beside_guidance_is_said_to_have_no_effect(turbo):
    assert "has no effect together" in " ".join(build(turbo, NAG_scale=4, guidance_scale=3).notes)
    assert build(turbo, NAG_scale=4).notes == ()


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

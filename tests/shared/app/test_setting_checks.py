"""What settings may be: sizes, ranges, what a model does not offer, and what is said to have no effect."""

import pytest

from shared.app.setting_checks import parse_resolution
from shared.quant.errors import UserError
from tests.support.built_settings import build, make_preset


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    return make_preset(tmp_path_factory.mktemp("turbo"), {"architecture": "z_image"})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_preset(tmp_path_factory.mktemp("base"), {"architecture": "z_image_base"})


def test_a_prompt_of_bytes_that_are_no_text_is_refused_in_words(base):
    with pytest.raises(UserError, match='"prompt" has a character that is none, after "caf"'):
        build(base, {}, prompt="caf\udce9 au lait")


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

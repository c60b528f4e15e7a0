"""Flags mean the same before and after the subcommand, and become settings under the host's names."""

from __future__ import annotations

import argparse

import pytest

from shared.cli.parser import build_parser, overrides_of, parse_arguments
from tests.support.fake_family import FakeHandler, fake_families


def parse(*arguments: str) -> argparse.Namespace:
    return parse_arguments(build_parser(fake_families(FakeHandler()), "lora_root"), arguments)


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [
        ("--loras", "styles", "loras"),
        ("--lora-dir-fake", "just_these", "lora_dir_fake"),
        ("--settings", "mine", "settings"),
        ("--config", "conf", "config"),
        ("--output-dir", "pictures", "output_dir"),
        ("--attention", "sdpa", "attention"),
        ("--gpu", "cpu", "gpu"),
        ("--offload", "stream", "offload"),
        ("--max-vram", "4GB", "max_vram"),
        ("--server-name", "0.0.0.0", "server_name"),
    ],
)
def test_flags_are_taken_before_and_after_the_subcommand(flag: str, value: str, name: str) -> None:
    assert getattr(parse(flag, value, "presets"), name) == value
    assert getattr(parse("presets", flag, value), name) == value
    assert getattr(parse(flag, "other", "presets", flag, value), name) == value
    assert getattr(parse(flag, value), name) == value


def test_numbers_and_switches_keep_their_value_over_the_subcommand() -> None:
    before = parse("--profile", "3.5", "--server-port", "7999", "--listen", "--verbose", "2", "presets")

    assert (before.profile, before.server_port, before.listen, before.verbose) == (3.5, 7999, True, 2)


def test_checkpoint_folders_add_up_wherever_they_stand() -> None:
    assert parse("--ckpts", "a", "presets", "--ckpts", "b", "--ckpts", "c").ckpts == ["a", "b", "c"]
    assert parse("--ckpts", "a").ckpts == ["a"]
    assert parse("presets").ckpts == []


def test_defaults_are_those_of_wan2gp() -> None:
    args = parse()

    assert args.command is None
    assert (args.profile, args.attention, args.server_port, args.server_name, args.listen) == (-1, "", 0, "", False)
    assert args.verbose == 1


def test_generate_flags_become_settings_under_the_hosts_names() -> None:
    args = parse(
        "generate", "a fox", "--negative-prompt", "blur", "--resolution", "256x384", "--steps", "9",
        "--guidance-scale", "2.5", "--seed", "11", "--batch-size", "3",
    )  # fmt: skip

    assert overrides_of(args) == {
        "prompt": "a fox",
        "negative_prompt": "blur",
        "resolution": "256x384",
        "num_inference_steps": 9,
        "guidance_scale": 2.5,
        "seed": 11,
        "batch_size": 3,
    }


def test_what_is_not_given_is_left_to_the_preset() -> None:
    assert overrides_of(parse("generate", "a fox")) == {"prompt": "a fox"}


def test_zero_and_empty_are_values() -> None:
    args = parse("generate", "", "--guidance-scale=0", "--negative-prompt", "", "--seed=0", "--error-lora-strength=0")

    expected = {"prompt": "", "guidance_scale": 0.0, "negative_prompt": "", "seed": 0, "error_lora_strength": 0.0}
    assert overrides_of(args) == expected


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("NAG_scale=2.5", "NAG_scale", 2.5),
        ("sample_solver=euler", "sample_solver", "euler"),
        ("cfg_normalization=1", "cfg_normalization", 1),
        ('activated_loras=["a.safetensors"]', "activated_loras", ["a.safetensors"]),
        ("negative_prompt=a=b", "negative_prompt", "a=b"),
        ("VAE_tile_size=", "VAE_tile_size", ""),
    ],
)
def test_set_takes_any_setting_as_json_or_plain_text(text: str, key: str, value: object) -> None:
    assert overrides_of(parse("generate", "x", "--set", text))[key] == value


def test_a_named_flag_wins_over_set() -> None:
    assert overrides_of(parse("generate", "x", "--set", "seed=1", "--seed", "2"))["seed"] == 2


def test_loras_come_with_their_strengths_in_order() -> None:
    args = parse("generate", "x", "--lora", "a.safetensors:0.8", "--lora", r"C:\b.sft", "--lora", "c.sft:-1")

    overrides = overrides_of(args)

    assert overrides["activated_loras"] == ["a.safetensors", r"C:\b.sft", "c.sft"]
    assert overrides["loras_multipliers"] == "0.8 1 -1"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "x", "--seed", "many"),
        ("generate", "x", "--set", "seed"),
        ("generate", "x", "--set", "=1"),
        ("generate", "x", "--prset", "a"),
        ("generate", "x", "--pre", "a"),
        ("draw", "x"),
        ("--verbose", "3"),
    ],
)
def test_what_cannot_be_understood_ends_with_code_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)

    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err

"""Folders, configuration and saved settings: flags first, other programs' keys untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.app.context import AppContext
from shared.app.settings import GenerationSettings
from shared.quant.errors import UserError
from tests.support.fake_family import FakeHandler, fake_context, write_preset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_preset(tmp_path, "one")
    return tmp_path


def context(root: Path, **flags: object) -> AppContext:
    return fake_context(root, FakeHandler(), **flags)


def test_folders_are_below_the_program_unless_said_otherwise(root: Path) -> None:
    ctx = context(root)

    assert ctx.output_folder == root / "outputs"
    assert ctx.settings_folder == root / "settings"
    assert ctx.lora_folder(ctx.presets.get("one")) == root / "lora_root" / "fake"
    assert ctx.files.roots == (root / "ckpts",)


def test_flags_win_over_the_configuration_and_are_relative_to_the_working_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "wgp_config.json").write_text(json.dumps({"save_path": "configured", "checkpoints_paths": ["models2"]}))
    monkeypatch.chdir(tmp_path)

    assert context(root).output_folder == root / "configured"
    flagged = context(root, output_dir="mine", ckpts=["extra", "extra"], loras="styles", lora_dir_fake="just/these")
    assert flagged.output_folder == tmp_path / "mine"
    assert flagged.files.roots == (root / "ckpts", root / "models2", tmp_path / "extra")
    assert flagged.lora_folder(flagged.presets.get("one")) == Path("just/these")


def test_the_configuration_can_live_in_another_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "wgp_config.json").write_text('{"profile": 3}')

    assert context(root, config=str(tmp_path / "conf")).config == {"profile": 3}


def test_saving_the_configuration_keeps_what_wan2gp_wrote(root: Path) -> None:
    (root / "wgp_config.json").write_text(json.dumps({"vae_config": 2, "profile": 4}))
    ctx = context(root)

    ctx.save_config(last_model_type="one", profile=5)

    assert json.loads((root / "wgp_config.json").read_text()) == {
        "vae_config": 2,
        "profile": 5,
        "last_model_type": "one",
    }
    assert ctx.config == {"profile": 5, "last_model_type": "one"}


def test_a_key_that_is_not_ours_is_not_saved(root: Path) -> None:
    with pytest.raises(ValueError, match="vae_config"):
        context(root).save_config(vae_config=1)


@pytest.mark.parametrize("content", ["{broken", "[]", "\xff"])
def test_a_broken_configuration_is_named(root: Path, content: str) -> None:
    (root / "wgp_config.json").write_text(content, encoding="latin-1")

    with pytest.raises(UserError, match=r"wgp_config\.json"):
        context(root)


def test_saved_settings_come_back_as_the_presets_defaults(root: Path) -> None:
    ctx = context(root)
    preset = ctx.presets.get("one")
    assert ctx.saved_settings(preset) == {}

    ctx.save_settings(preset, GenerationSettings.build(preset, {}, {"prompt": "fox", "num_inference_steps": 7}))

    saved = context(root).saved_settings(preset)
    assert GenerationSettings.build(preset, saved).num_inference_steps == 7


def test_refreshing_finds_a_preset_that_was_dropped_in(root: Path) -> None:
    ctx = context(root)
    write_preset(root, "mine", folder="finetunes")

    assert ctx.refresh_presets().get("mine").name == "Name of mine"


def test_a_broken_preset_of_the_program_leaves_the_old_ones_in_use(root: Path) -> None:
    ctx = context(root)
    (root / "defaults" / "bad.json").write_text("{")

    with pytest.raises(UserError, match=r"bad\.json"):
        ctx.refresh_presets()

    assert ctx.presets.get("one").id == "one"

"""All presets: a user's files lie over the program's, and a wrong one is left out without harm to the others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.app.presets import load_presets
from shared.quant.errors import UserError
from tests.support.preset_folders import HUB

ROOT = Path(__file__).resolve().parents[4]


def test_invisible_presets_are_usable_but_not_listed(folders):
    folders.default("shown", {"name": "B"})
    folders.default("also", {"name": "A"})
    folders.default("hidden", {"visible": False})

    collection = folders.load()

    assert [(label, [preset.id for preset in presets]) for label, presets in collection.grouped()] == [
        ("Z-Image", ["also", "shown"])
    ]
    assert collection.get("hidden").visible is False


def test_a_finetune_with_a_defaults_id_overrides_it_key_by_key(folders):
    shipped = folders.default("z_image", {"description": "shipped"}, num_inference_steps=8, batch_size=1)
    override = {"model": {"name": "Mine", "visible": False}, "batch_size": 4}
    mine = folders.finetunes / "z_image.json"
    mine.write_text(json.dumps(override), encoding="utf-8")

    preset = folders.load().get("z_image")

    assert (preset.name, preset.description, preset.visible) == ("Mine", "shipped", False)
    assert preset.urls == (f"{HUB}z_image_bf16.safetensors",)
    assert (preset.settings["num_inference_steps"], preset.settings["batch_size"]) == (8, 4)
    assert preset.files == (shipped, mine)


def test_a_new_architecture_in_an_override_brings_its_own_defaults(folders):
    folders.default("model")
    (folders.finetunes / "model.json").write_text('{"model": {"architecture": "z_image_base"}}', encoding="utf-8")

    preset = folders.load().get("model")

    assert preset.model_def["guidance_max_phases"] == 1
    assert preset.settings["num_inference_steps"] == 30


def test_a_broken_override_leaves_the_default_as_it_is(folders):
    folders.default("z_image")
    path = folders.finetune("z_image", {"URLs": "nowhere"})

    collection = folders.load()

    assert collection.get("z_image").urls == (f"{HUB}z_image_bf16.safetensors",)
    assert len(collection.problems) == 1
    assert str(path) in collection.problems[0]


def test_the_users_folder_may_be_missing(folders, tmp_path):
    folders.default("z_image")

    collection = load_presets([folders.defaults, tmp_path / "none"], folders.families)

    assert list(collection.presets) == ["z_image"]


def test_two_files_of_one_kind_with_one_id_are_an_error(folders, tmp_path):
    folders.default("z_image")
    first, second = folders.finetune("mine"), tmp_path / "more" / "mine.json"
    second.parent.mkdir()
    second.write_text(first.read_text(encoding="utf-8"), encoding="utf-8")

    collection = load_presets([folders.defaults, folders.finetunes, second.parent], folders.families)

    assert collection.problems == [
        f"{second}: {first} already has this preset id. Rename or remove one of the two files. This file is left out."
    ]
    assert collection.get("mine").files == (first,)


def test_ids_that_differ_only_in_case_are_an_error(folders):
    folders.default("z_image")
    folders.default("Z_Image")
    if len(list(folders.defaults.iterdir())) == 1:
        pytest.skip("file names ignore case here, so there cannot be two")

    with pytest.raises(UserError, match="already has this preset id"):
        folders.load()


def test_a_foreign_architecture_in_finetunes_does_not_hide_the_others(folders):
    folders.default("z_image")
    folders.finetune("wan", {"architecture": "t2v"})

    collection = folders.load()

    assert list(collection.presets) == ["z_image"]
    assert 'unknown architecture "t2v"' in collection.problems[0]


def test_an_unknown_preset_is_told_with_the_closest_ids(folders):
    folders.default("z_image")
    folders.default("z_image_base")

    with pytest.raises(UserError) as error:
        folders.load().get("z_imagebase")

    assert error.value.message == 'There is no preset "z_imagebase".'
    assert "z_image_base" in error.value.hint


def test_an_unknown_preset_like_no_other_is_told_with_those_there_are(folders):
    folders.default("z_image")

    with pytest.raises(UserError, match=r"Known: z_image\."):
        folders.load().get("qqq")


def test_listing_presets_imports_nothing_large():
    code = (
        "import sys; from pathlib import Path; from shared.app.families import load_families;"
        "from shared.app.presets import load_presets; import shared.app.settings;"
        "load_presets([Path('defaults')], load_families(Path('models')));"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'PIL', 'huggingface_hub', 'gradio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"

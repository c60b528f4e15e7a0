"""The shipped presets: strict, complete, and honest about what they need."""

import importlib
import json
import re

import pytest

from shared.app.families import load_families
from shared.app.presets import choose_files, load_presets
from shared.app.schema import MODEL_KEYS, SETTING_KEYS
from shared.app.settings import GenerationSettings
from shared.quant.formats import formats
from tests.support.file_arithmetic import TRANSFORMERS
from tests.support.shipped_presets import BIG, CONTROL, IDS, PACKED, ROOT, WAN2GP, file_name


@pytest.fixture(scope="module")
def collection():
    return load_presets([ROOT / "defaults"], load_families(ROOT / "models"))


def test_every_file_loads_without_a_note(collection):
    assert sorted(collection.presets) == IDS
    assert {preset_id: preset.notes for preset_id, preset in collection.presets.items()} == dict.fromkeys(IDS, ())


@pytest.mark.parametrize("preset_id", IDS)
def test_every_preset_builds_valid_settings_and_names_its_files(collection, preset_id):
    preset = collection.get(preset_id)

    GenerationSettings.build(preset, {}, {})
    plan = choose_files(preset)

    assert preset.description
    assert plan.transformer
    assert plan.text_encoder
    assert plan.vae


@pytest.mark.parametrize("preset_id", sorted(WAN2GP))
def test_presets_with_wan2gps_ids_mean_the_same(collection, preset_id):
    preset, theirs = collection.get(preset_id), WAN2GP[preset_id]

    assert preset.architecture == theirs["architecture"]
    assert preset.urls[0] == theirs["first_url"]
    assert {key: preset.settings[key] for key in theirs["settings"]} == theirs["settings"]


def test_base_asks_for_plain_attention_before_ada(collection):
    assert collection.get("z_image_base").model_def["attention"] == {"<89": "sdpa"}


def test_twinflow_draws_with_its_own_sampler(collection):
    definition = collection.get("z_image_twinflow_turbo").model_def

    assert definition["unified_solver"] is True
    assert definition["sample_solvers"][0][1] == "unified"


@pytest.mark.parametrize("preset_id", ["z_image_demo", "z_image_demo_base"])
def test_the_demo_needs_no_download(collection, preset_id):
    wants = choose_files(collection.get(preset_id)).wants

    assert {want.role for want in wants} == {"transformer", "text_encoder", "vae"}
    assert all(want.url.startswith("file:models/z_image/demo/") for want in wants)


@pytest.mark.parametrize("preset_id", ["z_image_demo", "z_image_demo_base"])
def test_the_demos_files_are_here(collection, preset_id):
    for want in choose_files(collection.get(preset_id)).wants:
        assert (ROOT / want.url.removeprefix("file:")).is_file(), want.url


def test_every_preset_with_big_files_is_described_here():
    small = [preset_id for preset_id in IDS if preset_id.startswith("z_image_demo")]
    assert sorted([*BIG, *CONTROL, *small]) == IDS
    assert sorted(TRANSFORMERS) == sorted(BIG)


@pytest.mark.parametrize("preset_id", sorted(PACKED))
def test_packed_files_are_of_the_described_format_and_can_be_read(collection, preset_id):
    reader, name, words = PACKED[preset_id]
    preset = collection.get(preset_id)

    assert importlib.import_module(f"shared.quant.formats.{reader}") in formats()
    assert [url for url in preset.urls if not re.fullmatch(name, file_name(url))] == []
    assert re.search(words, preset.description)


@pytest.mark.parametrize("preset_id", sorted(CONTROL))
def test_control_presets_name_one_controlnet_and_its_size(collection, preset_id):
    gigabytes, wan2gps = CONTROL[preset_id]
    preset = collection.get(preset_id)

    (module,) = choose_files(preset).modules
    assert f"{gigabytes} GB" in preset.description
    assert "guide_preprocessing" in preset.model_def
    assert wan2gps is None or file_name(module) == wan2gps
    assert preset.urls == collection.get("z_image_base" if "base" in preset_id else "z_image").urls


@pytest.mark.parametrize("preset_id", ["z_image", "z_image_base"])
def test_the_plain_presets_take_int8_only_when_asked(collection, preset_id):
    preset = collection.get(preset_id)

    assert choose_files(preset).transformer == preset.urls[0]
    assert choose_files(preset, "int8").transformer == collection.get(f"{preset_id}_int8").urls[0]


def test_no_two_files_share_a_name(collection):
    """Files are found by name, so one name must always mean one file."""
    wants = [want for preset in collection.presets.values() for want in choose_files(preset).wants]
    urls: dict[str, set[str]] = {}
    for url in {want.url for want in wants if not want.url.startswith("file:")}:
        urls.setdefault(file_name(url), set()).add(url)

    assert {name: found for name, found in urls.items() if len(found) > 1} == {}


def test_the_schema_page_lists_every_key_as_it_is_checked():
    page = (ROOT / "defaults" / "README.md").read_text(encoding="utf-8")
    rows = [f"| `{name}` | {key.kind.words} | {key.meaning} |" for name, key in MODEL_KEYS.items()]
    for name, key in SETTING_KEYS.items():
        default = "" if key.default is None else f"`{json.dumps(key.default)}`"
        rows.append(f"| `{name}` | {key.kind.words} | {key.meaning} | {default} |")

    assert [row for row in rows if row not in page.splitlines()] == []


def test_the_schema_pages_example_is_a_preset(tmp_path):
    page = (ROOT / "defaults" / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```json\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "example.json").write_text(example, encoding="utf-8")

    preset = load_presets([tmp_path], load_families(ROOT / "models")).get("example")

    assert preset.notes == ()
    assert preset.loras[0].strength() == 0.8

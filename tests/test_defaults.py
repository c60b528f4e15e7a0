"""The shipped presets: strict, complete, and honest about what they need."""

import json
import re
from pathlib import Path

import pytest

from shared.app.families import load_families
from shared.app.presets import choose_files, load_presets
from shared.app.schema import MODEL_KEYS, SETTING_KEYS
from shared.app.settings import GenerationSettings

ROOT = Path(__file__).resolve().parents[1]
IDS = sorted(path.stem for path in (ROOT / "defaults").glob("*.json"))

# Facts of Wan2GP's own presets of the same ids (defaults/*.json at 8681e9f7).
WAN2GP = {
    "z_image": {
        "architecture": "z_image",
        "first_url": "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/ZImageTurbo_bf16.safetensors",
        "settings": {
            "resolution": "1024x1024",
            "batch_size": 1,
            "num_inference_steps": 8,
            "guidance_scale": 0,
        },
    },
    "z_image_base": {
        "architecture": "z_image_base",
        "first_url": "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/ZImageBase_bf16.safetensors",
        "settings": {
            "resolution": "1024x1024",
            "batch_size": 1,
            "num_inference_steps": 30,
            "guidance_scale": 4,
            "flow_shift": 6.0,
        },
    },
}


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


@pytest.mark.parametrize("preset_id", ["z_image_demo", "z_image_demo_base"])
def test_the_demo_needs_no_download(collection, preset_id):
    wants = choose_files(collection.get(preset_id)).wants

    assert {want.role for want in wants} == {"transformer", "text_encoder", "vae"}
    assert all(want.url.startswith("file:models/z_image/demo/") for want in wants)


@pytest.mark.parametrize("preset_id", ["z_image_demo", "z_image_demo_base"])
def test_the_demos_files_are_here(collection, preset_id):
    for want in choose_files(collection.get(preset_id)).wants:
        assert (ROOT / want.url.removeprefix("file:")).is_file(), want.url


def test_only_formats_that_can_be_read_are_offered(collection):
    for preset in collection.presets.values():
        for url in preset.urls:
            assert not re.search(r"quanto|int8|int4|fp8|fp4|gguf|svdq|convrot", url.lower()), url


def test_sizes_in_descriptions_follow_from_the_parameter_counts(collection):
    # 6,154,908,736 and 4,022,468,096 parameters at 2 bytes, 83,819,683 in the VAE (counted on the shard indexes)
    sizes = [f"{count * 2 / 1e9:.1f} GB" for count in (6_154_908_736, 4_022_468_096, 83_819_683)]

    for preset_id in ("z_image", "z_image_base"):
        assert re.findall(r"[\d.]+ GB", collection.get(preset_id).description) == sizes


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

"""The sizes that presets, their page and the family state are those of the files."""

import re
from math import prod

import pytest

from models.z_image.variants import PUBLISHED_SHAPES
from shared.app.families import load_families
from shared.app.presets import choose_files, load_presets
from tests.support.file_arithmetic import BLOCKS, ENCODERS, TRANSFORMERS, encoder_shapes, fp8, total, transformer_shapes
from tests.support.shipped_presets import BIG, CONTROL, ROOT, file_name

# Bytes of files as their hosts list them (docs/presets.md names the pages); two decimals where only those are known.
PUBLISHED = {
    "z_image_comfy_bf16": 12_309_866_400,
    "z_image_comfy_int8": 6_201_001_296,
    "z_image_fp8_scaled": 6.16e9,
    "z_image_nvfp4_mixed": 4.84e9,
    "z_image_nunchaku_r128_int4": 4_011_374_152,
    "z_image_fp8": 6.15e9,
    "z_image_fp8_e5m2": 6.15e9,
    "z_image_mxfp8": 6.23 * 2**30,  # its card says GB, but 8 bits and scales for all parameters would be 6.35e9
    "z_image_gguf_q8_0": 7_224_707_136,
    "z_image_gguf_q6_k": 5.91e9,
    "z_image_gguf_q5_k_m": 5.52e9,
    "z_image_gguf_q4_k_m": 4_981_532_736,
    "z_image_gguf_q4_0": 3_683_370_944,
}

PUBLISHED_ENCODERS = {
    "qwen_3_4b.safetensors": 8_044_982_048,
    "Qwen3-4B-Q8_0.gguf": 4_280_404_704,
    "Qwen3-4B-Q4_K_M.gguf": 2_497_281_312,
}


@pytest.fixture(scope="module")
def collection():
    return load_presets([ROOT / "defaults"], load_families(ROOT / "models"))


def test_the_arithmetic_starts_from_the_published_parameter_counts():
    assert sum(map(prod, transformer_shapes().values())) == 6_154_908_736
    assert sum(map(prod, encoder_shapes().values())) == 4_022_468_096


@pytest.mark.parametrize("preset_id", BIG)
def test_sizes_in_descriptions_follow_from_the_shapes(collection, preset_id):
    preset = collection.get(preset_id)
    encoder = ENCODERS[file_name(choose_files(preset).text_encoder)]
    counted = (total(transformer_shapes(), TRANSFORMERS[preset_id]), total(encoder_shapes(), encoder), 83_819_683 * 2)

    assert re.findall(r"[\d.]+ GB", preset.description) == [f"{count / 1e9:.1f} GB" for count in counted]


@pytest.mark.parametrize("preset_id", [*BIG, *CONTROL])
def test_every_preset_with_a_download_says_what_its_files_weigh(collection, preset_id):
    preset = collection.get(preset_id)
    plan = choose_files(preset)
    wants = {want.role: want for want in plan.wants if want.role != "companion"}

    assert [role for role, want in wants.items() if not want.published] == []
    stated = {role: want.published / 1e9 for role, want in wants.items()}
    words = re.findall(r"([\d.]+) GB", preset.description)
    told = {"module": words[0]} if preset_id in CONTROL else dict(zip(wants, words, strict=True))
    for role, gigabytes in told.items():
        assert stated[role] == pytest.approx(float(gigabytes), abs=0.051)
    origin = preset_id if preset_id in BIG else preset.model_def["URLs"]
    encoder = ENCODERS[file_name(plan.text_encoder)]
    assert stated["transformer"] == pytest.approx(total(transformer_shapes(), TRANSFORMERS[origin]) / 1e9, rel=0.005)
    assert stated["text_encoder"] == pytest.approx(total(encoder_shapes(), encoder) / 1e9, rel=0.005)
    assert stated["vae"] == pytest.approx(83_819_683 * 2 / 1e9, abs=0.005)


@pytest.mark.parametrize("preset_id", ["z_image", "z_image_base", "z_image_twinflow_turbo"])
def test_the_int8_alternative_has_its_own_size(collection, preset_id):
    wants = {want.role: want for want in choose_files(collection.get(preset_id), "int8").wants}

    assert "int8" in file_name(wants["transformer"].url) and wants["transformer"].published == 6_890_000_000
    assert "int8" in file_name(wants["text_encoder"].url) and wants["text_encoder"].published == 4_410_000_000


def test_the_familys_published_shapes_are_those_of_its_models():
    inside = {key: shape for key, shape in transformer_shapes().items() if re.fullmatch(BLOCKS, key)}
    outside = [
        shape for key, shape in transformer_shapes().items() if not re.match(r"\w+\.\d+\.(att|ffn|fee|ada)", key)
    ]
    drawn, read = PUBLISHED_SHAPES["transformer"], PUBLISHED_SHAPES["text_encoder"]

    assert drawn["numbers"] == sum(map(prod, transformer_shapes().values()))
    assert drawn["outside"] == sum(map(prod, outside))
    assert drawn["products"] == sum(prod(shape) for key, shape in inside.items() if "adaLN" not in key)
    kept = [shape for key, shape in transformer_shapes().items() if not key.startswith("layers.")]
    assert drawn["unpacked"] == sum(map(prod, kept))
    matrices = {key: shape for key, shape in encoder_shapes().items() if key.startswith("layers.") and len(shape) == 2}
    assert read["numbers"] == sum(map(prod, encoder_shapes().values()))
    assert read["outside"] == prod(encoder_shapes()["embed_tokens.weight"]) + 2560
    assert read["products"] == sum(map(prod, matrices.values()))
    assert PUBLISHED_SHAPES["vae"]["numbers"] == 83_819_683


def test_the_arithmetic_meets_the_published_files():
    for preset_id, published in PUBLISHED.items():
        assert total(transformer_shapes(), TRANSFORMERS[preset_id]) == pytest.approx(published, rel=0.005), preset_id
    for name, published in PUBLISHED_ENCODERS.items():
        assert total(encoder_shapes(), ENCODERS[name]) == pytest.approx(published, rel=0.005), name


def test_the_file_of_all_three_parts_is_their_sum():
    parts = total(transformer_shapes(), fp8) + total(encoder_shapes(), fp8) + 83_819_683 * 2

    assert parts == pytest.approx(10_345_190_658, rel=1e-4)  # its size in a public program's list of downloads


def test_the_presets_page_lists_every_file_with_its_size(collection):
    rows = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8").splitlines()
    missing = []
    for preset_id in BIG:
        url = collection.get(preset_id).urls[0]
        size = f"{total(transformer_shapes(), TRANSFORMERS[preset_id]) / 1e9:.2f}"
        missing += [] if any(row.startswith(f"| `{preset_id}` | {size} | <{url}>") for row in rows) else [preset_id]
    for url in {choose_files(collection.get(preset_id)).text_encoder for preset_id in BIG}:
        size = f"{total(encoder_shapes(), ENCODERS[file_name(url)]) / 1e9:.2f}"
        missing += [] if any(row.startswith(f"| {size} | <{url}>") for row in rows) else [url]

    assert missing == []

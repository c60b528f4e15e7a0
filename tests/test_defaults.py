"""The shipped presets: strict, complete, and honest about what they need."""

import importlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch

from models.z_image.config import TransformerConfig
from models.z_image.transformer import ZImageTransformer
from models.z_image.variants import PUBLISHED_SHAPES
from shared.app.families import load_families
from shared.app.presets import choose_files, load_presets
from shared.app.schema import MODEL_KEYS, SETTING_KEYS
from shared.app.settings import GenerationSettings
from shared.quant.formats import formats
from shared.quant.recipe import Recipe

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
    "z_image_twinflow_turbo": {
        "architecture": "z_image",
        "first_url": "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/TwinFlow-Z-Image-Turbo_bf16.safetensors",
        "settings": {
            "resolution": "1024x1024",
            "batch_size": 1,
            "num_inference_steps": 2,
            "guidance_scale": 0,
        },
    },
    "z_image_nunchaku_r256_int4": {
        "architecture": "z_image",
        "first_url": "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/svdq-int4_r256-z-image-turbo.safetensors",
        "settings": {
            "resolution": "1024x1024",
            "batch_size": 1,
            "num_inference_steps": 8,
            "guidance_scale": 0,
        },
    },
    "z_image_nunchaku_r128_fp4": {
        "architecture": "z_image",
        "first_url": "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/svdq-fp4_r128-z-image-turbo.safetensors",
        "settings": {
            "resolution": "1024x1024",
            "batch_size": 1,
            "num_inference_steps": 8,
            "guidance_scale": 0,
        },
    },
}


# Which reader opens each packed preset's transformer, and what its file's name and description say of the format.
PACKED = {
    "z_image_int8": ("quanto_int8", r"ZImageTurbo_quanto_bf16_int8\.safetensors", "8-bit integer weights"),
    "z_image_base_int8": ("quanto_int8", r"ZImageBase_quanto_bf16_int8\.safetensors", "8-bit integer weights"),
    "z_image_nunchaku_r32_int4": ("svdq", r"svdq-int4_r32-.*\.safetensors", "4-bit integers.* rank 32 "),
    "z_image_nunchaku_r128_int4": ("svdq", r"svdq-int4_r128-.*\.safetensors", "4-bit integers.* rank 128 "),
    "z_image_nunchaku_r256_int4": ("svdq", r"svdq-int4_r256-.*\.safetensors", "4-bit integers.* rank 256 "),
    "z_image_nunchaku_r32_fp4": ("svdq", r"svdq-fp4_r32-.*\.safetensors", "4-bit floats.* rank 32 "),
    "z_image_nunchaku_r128_fp4": ("svdq", r"svdq-fp4_r128-.*\.safetensors", "4-bit floats.* rank 128 "),
    "z_image_nvfp4_mixed": ("nvfp4", r"z_image_turbo_nvfp4\.safetensors", "NVFP4, with MXFP8"),
    "z_image_fp8_scaled": ("fp8_scaled", r".*_fp8_scaled_e4m3fn_.*\.safetensors", r"8-bit float weights \(e4m3\)"),
    "z_image_fp8": ("fp8_plain", r"z-image-turbo-fp8-e4m3fn\.safetensors", r"8-bit floats \(e4m3\) without scales"),
    "z_image_fp8_e5m2": ("fp8_plain", r"z-image-turbo-fp8-e5m2\.safetensors", r"8-bit floats \(e5m2, .*without scales"),
    "z_image_aio_fp8": ("fp8_plain", r"z-image-turbo-fp8-aio\.safetensors", r"in one file.* without scales"),
    "z_image_mxfp8": ("mxfp8", r"zImageTurbo-mxfp8\.safetensors", "MXFP8 .* bf16 for critical layers"),
    "z_image_comfy_int8": ("comfy_int8", r"z_image_turbo_int8_convrot\.safetensors", "int8 file.* rotated"),
    "z_image_gguf_q8_0": ("gguf", r".*-Q8_0\.gguf", "GGUF file, 8 bits"),
    "z_image_gguf_q6_k": ("gguf", r".*-Q6_K\.gguf", "GGUF file, 6 bits"),
    "z_image_gguf_q5_k_m": ("gguf", r".*-Q5_K_M\.gguf", "GGUF file, 5 and 6 bits"),
    "z_image_gguf_q4_k_m": ("gguf", r".*-Q4_K_M\.gguf", "GGUF file, 4 to 6 bits"),
    "z_image_gguf_q4_0": ("gguf", r".*-Q4_0\.gguf", "GGUF file of stable-diffusion.cpp, 4 bits"),
}
# The ControlNet of each preset that has one: gigabytes of its bf16 file, and its name in Wan2GP's preset of the same
# id (defaults/*.json at 8681e9f7; for 8 steps Wan2GP pairs a Tile file with a Union one, which is not repeated here).
CONTROL = {
    "z_image_control": (3.1, "Z-Image-Turbo-Fun-Controlnet-Union_bf16.safetensors"),
    "z_image_control2": (6.7, "Z-Image-Turbo-Fun-Controlnet-Union2_bf16.safetensors"),
    "z_image_control2_1": (6.7, "Z-Image-Turbo-Fun-Controlnet-Union2.1_bf16.safetensors"),
    "z_image_control2_1_8s": (6.7, None),
    "z_image_control2_1_lite": (2.0, None),
    "z_image_control2_1_tile": (6.7, None),
    "z_image_base_control2_1": (6.7, None),
}
PLAIN = ("z_image", "z_image_base", "z_image_twinflow_turbo", "z_image_comfy_bf16", "z_image_base_comfy_bf16")
BIG = [*PLAIN, *PACKED]

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

Shapes = Mapping[str, tuple[int, ...]]
Cost = Callable[[str, tuple[int, ...]], float]  # bytes of one tensor, by name and shape

TRUNK = r"layers\.\d+\.(attention\.(qkv|out)|feed_forward\.w(13|2)|adaLN_modulation\.0)\.weight"
BLOCKS = TRUNK.replace("layers", "(layers|noise_refiner|context_refiner)")
ATTENTION_AND_FFN = BLOCKS.replace("|adaLN_modulation\\.0", "")
GGUF_BYTES = {
    "Q8_0": 34 / 32,
    "Q4_0": 18 / 32,
    "Q6_K": 210 / 256,
    "Q5_K": 176 / 256,
    "Q4_K": 144 / 256,
}  # a number, scales included


@cache
def transformer_shapes() -> Shapes:
    """Every tensor of the 6B model under our names, q, k, v and w1, w3 fused."""
    with torch.device("meta"):
        model = ZImageTransformer(TransformerConfig())
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@cache
def encoder_shapes() -> Shapes:
    """Qwen3-4B, sizes of its config.json; its output matrix is its embedding table."""
    linears = {
        "self_attn.q_proj": (4096, 2560),
        "self_attn.k_proj": (1024, 2560),
        "self_attn.v_proj": (1024, 2560),
        "self_attn.o_proj": (2560, 4096),
        "mlp.gate_proj": (9728, 2560),
        "mlp.up_proj": (9728, 2560),
        "mlp.down_proj": (2560, 9728),
    }
    vectors = {
        "input_layernorm": 2560,
        "post_attention_layernorm": 2560,
        "self_attn.q_norm": 128,
        "self_attn.k_norm": 128,
    }
    layer = linears | {name: (size,) for name, size in vectors.items()}
    layers = {f"layers.{i}.{name}.weight": shape for i in range(36) for name, shape in layer.items()}
    return layers | {"embed_tokens.weight": (151936, 2560), "norm.weight": (2560,)}


def bf16(name: str, shape: tuple[int, ...]) -> float:
    return 2 * prod(shape)


def fp8(name: str, shape: tuple[int, ...]) -> float:
    """A file cast with everything in it."""
    return prod(shape)


def packed(pattern: str, cost: Cost) -> Cost:
    """`cost` for the weights whose whole name fits, bf16 for the rest."""
    return lambda name, shape: (cost if re.fullmatch(pattern, name) else bf16)(name, shape)


def int8_rows(scale_bytes: int) -> Cost:
    return lambda name, shape: prod(shape) + scale_bytes * shape[0]


def svdq(kind: str, rank: int) -> Cost:
    """Codes, scales of groups, two smoothing vectors, the low-rank pair; FP4 has a further scale: qkv one per row."""

    def cost(name: str, shape: tuple[int, ...]) -> float:
        rows, columns = shape
        scales = rows * columns // 64 * 2 if kind == "int4" else rows * columns // 16
        further = 0 if kind == "int4" else 2 * rows if "qkv" in name else 2
        return rows * columns // 2 + scales + further + 4 * columns + 2 * rank * (rows + columns)

    return packed(ATTENTION_AND_FFN, cost)


@cache
def mixed_recipe() -> Recipe:
    return Recipe.load(ROOT / "models" / "z_image" / "recipes" / "nvfp4_mixed.json", ("nvfp4", "mxfp8", "bf16"))


def nvfp4_mixed(name: str, shape: tuple[int, ...]) -> float:
    """By the layer map of the recipe; blocks of 16 (NVFP4) and 32 (MXFP8) with a scale byte each."""
    if ".w13." in name:
        half = (shape[0] // 2, shape[1])
        return sum(nvfp4_mixed(name.replace("w13", which), half) for which in ("w1", "w3"))
    kept = mixed_recipe().format_of(name.removesuffix(".weight")) if name.endswith(".weight") else "bf16"
    numbers = prod(shape)
    return {"bf16": numbers * 2, "mxfp8": numbers + numbers // 32, "nvfp4": numbers // 2 + numbers // 16 + 4}[kept]


def mxfp8(name: str, shape: tuple[int, ...]) -> float:
    """By the layer list of the card: all of the blocks, but for these."""
    if ".w13." in name:
        half = (shape[0] // 2, shape[1])
        return sum(mxfp8(name.replace("w13", which), half) for which in ("w1", "w3"))
    critical = (
        r"layers\.29\.attention\.qkv|layers\.2[2-9]\.adaLN_modulation\.0|context_refiner\.[01]\.attention\.out|"
        r"context_refiner\.1\.feed_forward\.w2|noise_refiner\.1\.(attention\.(qkv|out)|feed_forward\.w2)|"
        r"noise_refiner\.[01]\.feed_forward\.w3"
    )
    kept = re.fullmatch(rf"({critical})\.weight", name) or not re.fullmatch(BLOCKS.replace("(13|2)", "[123]"), name)
    return bf16(name, shape) if kept else prod(shape) * 33 / 32


def sd_cpp_q4_0(name: str, shape: tuple[int, ...]) -> float:
    """stable-diffusion.cpp's layout: blocks packed, one refiner in Q8_0 (the published size says so), the rest F32."""
    if len(shape) == 1 or not re.fullmatch(BLOCKS, name):
        return 4 * prod(shape)
    return prod(shape) * GGUF_BYTES["Q8_0" if name.startswith("context_refiner") else "Q4_0"]


def gguf(usual: str, *, qkv: str = "", w2: str = "") -> Cost:
    """city96's layout: the 30 layers packed, vectors float32, the rest bf16."""

    def cost(name: str, shape: tuple[int, ...]) -> float:
        if len(shape) == 1:
            return 4 * prod(shape)
        if not re.fullmatch(TRUNK, name):
            return bf16(name, shape)
        kind = (qkv if ".qkv." in name else w2 if ".w2." in name else "") or usual
        return prod(shape) * GGUF_BYTES[kind]

    return cost


def gguf_encoder(name: str, shape: tuple[int, ...]) -> float:
    """llama.cpp's Q4_K_M: Q6_K for the embedding table, and for v and down of its "use more bits" layers."""
    if len(shape) == 1:
        return 4 * prod(shape)
    layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
    more = layer < 36 // 8 or layer >= 36 * 7 // 8 or (layer - 36 // 8) % 3 == 2
    six = name.startswith("embed") or (more and ("v_proj" in name or "down_proj" in name))
    return prod(shape) * GGUF_BYTES["Q6_K" if six else "Q4_K"]


TRANSFORMERS: Mapping[str, Cost] = {
    **dict.fromkeys(PLAIN, bf16),
    **dict.fromkeys(("z_image_int8", "z_image_base_int8"), packed(TRUNK, int8_rows(2))),
    **{f"z_image_nunchaku_r{rank}_int4": svdq("int4", rank) for rank in (32, 128, 256)},
    **{f"z_image_nunchaku_r{rank}_fp4": svdq("fp4", rank) for rank in (32, 128)},
    "z_image_nvfp4_mixed": nvfp4_mixed,
    "z_image_fp8_scaled": packed(rf"{BLOCKS}|cap_embedder\.1\.weight", lambda name, shape: prod(shape) + 4),
    **dict.fromkeys(("z_image_fp8", "z_image_fp8_e5m2", "z_image_aio_fp8"), fp8),
    "z_image_mxfp8": mxfp8,
    "z_image_comfy_int8": packed(BLOCKS, int8_rows(4)),
    "z_image_gguf_q8_0": gguf("Q8_0"),
    "z_image_gguf_q6_k": gguf("Q6_K"),
    "z_image_gguf_q5_k_m": gguf("Q5_K", qkv="Q6_K", w2="Q6_K"),
    "z_image_gguf_q4_k_m": gguf("Q4_K", qkv="Q5_K", w2="Q6_K"),
    "z_image_gguf_q4_0": sd_cpp_q4_0,
}
ENCODERS: Mapping[str, Cost] = {
    "qwen3_bf16.safetensors": bf16,
    "qwen_3_4b.safetensors": bf16,
    "qwen3_quanto_bf16_int8.safetensors": packed(r"layers\..*_proj\.weight", int8_rows(2)),
    "Qwen3-4B-Q8_0.gguf": lambda name, shape: prod(shape) * (4 if len(shape) == 1 else GGUF_BYTES["Q8_0"]),
    "Qwen3-4B-Q4_K_M.gguf": gguf_encoder,
    "z-image-turbo-fp8-aio.safetensors": fp8,
}


def total(shapes: Shapes, cost: Cost) -> float:
    return sum(cost(name, shape) for name, shape in shapes.items())


def file_name(url: str) -> str:
    return url.rpartition("/")[2]


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

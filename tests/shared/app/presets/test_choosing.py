"""Of alternative files one is chosen by Wan2GP's rule, and a plan lists each file once."""

import pytest

from shared.app.device import DeviceInfo
from shared.app.presets import LoraChoice, choose_files
from tests.support.preset_folders import HUB, QWEN


def gpu(capability):
    return DeviceInfo("cuda", "GPU", capability, 2**34, "test")


ALTERNATIVES = ["m_bf16.safetensors", "m_fp8.safetensors", "m_quanto_fp16_int8.safetensors", "M_quanto_BF16_INT8.sft"]


@pytest.mark.parametrize(
    ("urls", "preference", "capability", "chosen"),
    [
        (ALTERNATIVES, "", 89, "m_bf16.safetensors"),
        (ALTERNATIVES, "bf16", 89, "m_bf16.safetensors"),
        (ALTERNATIVES, "int8", 89, "M_quanto_BF16_INT8.sft"),
        (ALTERNATIVES, "int8", 75, "m_quanto_fp16_int8.safetensors"),
        (ALTERNATIVES, "fp8", 89, "M_quanto_BF16_INT8.sft"),  # no fp8 file is named bf16, an int8 one is
        (ALTERNATIVES[:2], "int8", 89, "m_fp8.safetensors"),
        (ALTERNATIVES[:1], "int8", 89, "m_bf16.safetensors"),
        (["svdq-int4.safetensors", "svdq-fp4.safetensors"], "fp8", 120, "svdq-int4.safetensors"),
    ],
)
def test_one_alternative_is_chosen_by_wan2gps_rule(folders, urls, preference, capability, chosen):
    folders.default("z_image", {"URLs": [HUB + url for url in urls]})

    plan = choose_files(folders.load().get("z_image"), preference, gpu(capability))

    assert plan.transformer == HUB + chosen


def test_a_demanded_number_type_decides_between_alternatives(folders):
    folders.default("z_image", {"URLs": [HUB + url for url in ALTERNATIVES], "dtype": "fp16"})

    plan = choose_files(folders.load().get("z_image"), "int8", gpu(89))

    assert plan.transformer == HUB + "m_quanto_fp16_int8.safetensors"


def test_the_text_encoder_may_have_its_own_preference(folders):
    folders.default("z_image")
    preset = folders.load().get("z_image")

    assert choose_files(preset, "int8").text_encoder == f"{QWEN}qwen3_quanto_bf16_int8.safetensors"
    assert choose_files(preset, "int8", text_encoder_preference="").text_encoder == f"{QWEN}qwen3_bf16.safetensors"


def test_a_plan_lists_every_file_once_with_its_folder(folders):
    folders.default("z_image", {"modules": [["union.safetensors"]], "preload_URLs": [f"{HUB}a.json|%lora_dir"]})

    wants = choose_files(folders.load().get("z_image")).wants

    listed = [(want.role, want.url.rsplit("/", 1)[-1], want.subfolder) for want in wants]
    assert listed == [
        ("transformer", "z_image_bf16.safetensors", ""),
        ("module", "union.safetensors", ""),
        ("text_encoder", "qwen3_bf16.safetensors", "Qwen3"),
        ("vae", "ZImageTurbo_VAE_bf16.safetensors", ""),
        ("companion", "tokenizer.json", "Qwen3"),
        ("companion", "tokenizer_config.json", "Qwen3"),
        ("companion", "vocab.json", "Qwen3"),
        ("companion", "config.json", "Qwen3"),
        ("companion", "merges.txt", "Qwen3"),
        ("companion", "ZImageTurbo_VAE_bf16_config.json", ""),
        ("companion", "ZImageTurbo_scheduler_config.json", ""),
        ("preload", "a.json", "loras"),
    ]
    assert len(set(wants)) == len(wants)


def test_a_loras_strength_is_read_as_numbers():
    assert LoraChoice("a.safetensors", "0.8").strength() == 0.8
    assert LoraChoice("a.safetensors", "1,0.5").strength() == ((1.0, 0.5),)

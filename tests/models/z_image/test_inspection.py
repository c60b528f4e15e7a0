"""What a file is, told from its header alone."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from models.z_image.inspection import describe
from shared.app.inspection import inspect_path
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError
from shared.quant.formats import fp8_scaled, nvfp4
from tests.support.big_files import transformer_shapes, write_safetensors
from tests.support.tiny_model import TINY

FAMILIES = {"z_image": None}


def to_nunchaku(name: str) -> str:
    """A name of diffusers as in nunchaku's files, whose w3 and w1 lie on top of each other."""
    return name.replace("feed_forward.w3.", "feed_forward.net.0.proj.").replace(
        "feed_forward.w2.", "feed_forward.net.2."
    )


def test_a_transformer_tells_its_sizes(model_folder: Path) -> None:
    (found,) = inspect_path(model_folder / "transformer.safetensors", FAMILIES)

    assert (found["kind"], found["naming"], list(found["formats"])) == ("transformer", "diffusers", ["F32"])
    assert (found["sizes"]["dim"], found["sizes"]["n_layers"]) == (TINY.dim, TINY.n_layers)
    assert found["parameters"] * 4 == found["bytes"]
    assert not found["problems"]


@pytest.mark.skipif(sys.platform == "win32", reason="the file takes no room only where files have holes")
@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "FP8"])
def test_a_file_of_six_billion_numbers_is_told_in_a_second(tmp_path: Path, packed: bool) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in transformer_shapes().items():
        is_packed = packed and re.search(r"\.(attention\.(qkv|out)|feed_forward\.w[123])\.weight$", name)
        tensors[name] = ("F8_E4M3" if is_packed else "BF16", shape)
        if is_packed:
            tensors[name.replace(".weight", ".weight_scale")] = ("F32", ())
    write_safetensors(tmp_path / "big.safetensors", tensors, None)

    began = time.process_time()
    (found,) = inspect_path(tmp_path / "big.safetensors", FAMILIES)

    assert time.process_time() - began < 1
    assert found["summary"] == "Z-Image transformer (6B)"
    assert found["parameters"] == 6_154_908_736
    assert found["bytes"] > (6e9 if packed else 12.3e9)


def test_packed_layers_are_counted_by_how_they_are_kept(model_folder: Path, tmp_path: Path) -> None:
    state = load_file(model_folder / "transformer.safetensors")
    for module, packer in (("layers.0", nvfp4), ("layers.1", fp8_scaled)):
        weight = state.pop(f"{module}.feed_forward.w2.weight")
        state |= {f"{module}.feed_forward.w2.{suffix}": t for suffix, t in packer.quantize(weight).items()}
    save_file(state, tmp_path / "mixed.safetensors")

    (found,) = inspect_path(tmp_path / "mixed.safetensors", FAMILIES)

    assert found["formats"] == {"F32": 62, "nvfp4": 1, "FP8 scaled e4m3fn": 1}
    (plain,) = inspect_path(model_folder / "transformer.safetensors", FAMILIES)
    assert found["parameters"] == plain["parameters"], "scales and markers are no parameters, two codes a byte are two"
    assert found["sizes"]["ffn_dim"] == TINY.ffn_dim


@pytest.mark.parametrize(("names", "naming"), [(lambda n: n, "diffusers"), (to_nunchaku, "nunchaku")])
def test_whose_names_a_file_has_is_told(
    model_folder: Path, tmp_path: Path, names: Callable[[str], str], naming: str
) -> None:
    state = load_file(model_folder / "transformer.safetensors")
    save_file({names(name): tensor for name, tensor in state.items()}, tmp_path / "f.safetensors")

    (found,) = inspect_path(tmp_path / "f.safetensors", FAMILIES)

    assert (found["kind"], found["naming"]) == ("transformer", naming)


def test_what_a_file_says_of_its_calibration_is_told(tmp_path: Path) -> None:
    scaled = {"a.weight": torch.ones(4, 4), "a.input_scale": torch.tensor(0.1), "b.scale_input": torch.tensor(0.2)}
    quanto = {"c.weight._data": torch.ones(4, 4, dtype=torch.int8), "c.input_scale": torch.tensor(1.0)}
    save_file(scaled | quanto, tmp_path / "f.safetensors")
    writer = GGUFWriter(tmp_path / "f.gguf", "lumina2")
    writer.add_string("quantize.imatrix.file", "z_image.imatrix")
    writer.add_int32("quantize.imatrix.chunks_count", 120)
    writer.add_tensor("a.weight", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    (of_scales,) = inspect_path(tmp_path / "f.safetensors", FAMILIES)
    (of_llama_cpp,) = inspect_path(tmp_path / "f.gguf", FAMILIES)

    assert of_scales["calibration"] == {"layers with a scale for their inputs": 2}, "quanto's are always 1"
    assert of_llama_cpp["calibration"] == {"imatrix.file": "z_image.imatrix", "imatrix.chunks_count": "120"}


def test_an_unknown_packing_is_a_problem_and_not_a_crash(model_folder: Path, tmp_path: Path) -> None:
    state = load_file(model_folder / "transformer.safetensors")
    state["layers.0.feed_forward.w2.weight"] = torch.zeros(7, dtype=torch.int16)
    save_file(state, tmp_path / "odd.safetensors")

    (found,) = inspect_path(tmp_path / "odd.safetensors", FAMILIES)

    assert "layers.0.feed_forward.w2 is packed in a way this version does not know" in found["problems"][0]


def test_every_part_of_a_folder_is_listed(model_folder: Path) -> None:
    kinds = {Path(f["file"]).parent.name: f["kind"] for f in inspect_path(model_folder, FAMILIES)}

    assert kinds == {model_folder.name: "transformer", "text_encoder": "text_encoder", "vae": "vae"}


@pytest.mark.parametrize(
    ("state", "kind", "says"),
    [
        ({"layers.0.attention.to_q.lora_A.weight": (8, 384)}, "lora", "Z-Image LoRA"),
        ({"lora_unet_layers_0_attention_qkv.lora_down.weight": (8, 384)}, "lora", "Z-Image LoRA"),
        ({"layers.0.attention.to.q.lora.down.weight": (8, 384)}, "lora", "Z-Image LoRA"),
        (
            {
                "transformer.layers.0.attention.to_q.lora_A.weight": (8, 384),
                "transformer.layers.0.attention.to_q.lora_magnitude_vector": (384,),
            },
            "lora",
            "Z-Image DoRA",
        ),
        ({"lycoris_layers_0_attention_to_q.lokr_w2_a": (48, 4)}, "lora", "Z-Image LoKr"),
        ({"diffusion_model.layers.0.attention.qkv.diff": (1152, 384)}, "lora", "Z-Image full differences"),
        ({"control_layers.0.attention_norm1.weight": (384,)}, "control", "Fun ControlNet"),
        (
            {
                "control_all_x_embedder.2-1.weight": (384, 64),
                "control_layers.0.attention_norm1.weight": (384,),
                "control_noise_refiner.0.attention_norm1.weight": (384,),
            },
            "control",
            r"Fun ControlNet Union 1\.0",
        ),
        (
            {
                "first_stage_model.decoder.conv_in.weight": (8, 16, 3, 3),
                "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
            },
            "vae",
            "AutoencoderKL, ldm naming",
        ),
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "other", "FLUX"),
        ({"unheard.of": (1,)}, "other", r"begin with unheard\.of"),
    ],
)
def test_other_kinds_are_named(tmp_path: Path, state: dict[str, tuple[int, ...]], kind: str, says: str) -> None:
    save_file({n: torch.zeros(s) for n, s in state.items()}, tmp_path / "f.safetensors")

    (found,) = inspect_path(tmp_path / "f.safetensors", FAMILIES)

    assert found["kind"] == kind
    assert re.search(says, found["summary"])


def test_a_full_checkpoint_lists_what_it_contains(model_folder: Path, tmp_path: Path) -> None:
    state = load_file(model_folder / "transformer.safetensors")
    whole = {f"model.diffusion_model.{n}": t for n, t in state.items()} | {
        "vae.decoder.conv_in.weight": torch.zeros(1),
        "text_encoders.qwen3_4b.transformer.model.norm.weight": torch.zeros(1),
    }
    save_file(whole, tmp_path / "all.safetensors")

    found = describe(Checkpoint.open(tmp_path / "all.safetensors"))

    assert found is not None
    assert (found["kind"], found["contains"]) == ("checkpoint", ["transformer", "text encoder", "VAE"])


def test_a_broken_file_in_a_folder_does_not_hide_the_others(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 20)
    (tmp_path / "b.safetensors").symlink_to(model_folder / "transformer.safetensors")

    assert [f["kind"] for f in inspect_path(tmp_path, FAMILIES)] == ["unreadable", "transformer"]
    with pytest.raises(CheckpointError):
        inspect_path(tmp_path / "a.safetensors", FAMILIES)


def test_torch_is_not_needed(model_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from shared.app.inspection import inspect_path;"
        f"inspect_path(Path({str(model_folder)!r}), {{'z_image': None}}); assert 'torch' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", code], check=True)

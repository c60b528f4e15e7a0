"""A scale that is no number is named: when a small file is loaded, and before a large one's first picture is there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from diffusers import ZImageTransformer2DModel
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file, save_file

from models.z_image import loader, text_encoder
from models.z_image.loader import load_transformer
from models.z_image.text_encoder import TextEncoder, load_text_encoder, load_tokenizer
from models.z_image.z_image_main import model_factory
from shared.quant.errors import CheckpointError
from shared.quant.formats import comfy_int8, fp8_scaled, mxfp8, nvfp4, quanto_int8
from tests.support.packed_model import State, official_names

Q8_0 = GGMLQuantizationType.Q8_0
HURT = "layers.1.feed_forward.w2.weight"
HURT_ENCODER = "layers.0.mlp.down_proj.weight"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of any size are treated as large ones."""
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)
    monkeypatch.setattr(text_encoder, "MAPPED_FROM", 0)


def gguf_file(path: Path, state: State, hurt: str = "") -> Path:
    """The matrices in Q8_0 by the gguf package; `hurt` has an infinite scale in its last block."""
    writer = GGUFWriter(path, "lumina2")
    for name, tensor in state.items():
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0 and "embed" not in name and "pad" not in name:
            data = quantize(tensor.float().numpy(), Q8_0)
            if name == hurt:
                data[-1, -34:-32] = (0x00, 0x7C)
            writer.add_tensor(name, data, raw_dtype=Q8_0)
        else:
            writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def state(reference_transformer: ZImageTransformer2DModel) -> State:
    return official_names(reference_transformer.state_dict())


def draw(path: Path, model_folder: Path, steps: list[int]) -> torch.Tensor | None:
    factory = model_factory(
        model_filename=path,
        text_encoder_filename=model_folder / "text_encoder" / "model.safetensors",
        vae_filename=model_folder / "vae" / "diffusion_pytorch_model.safetensors",
        dtype=torch.float32,
        keep_mapped=True,
    )
    return factory.generate(
        input_prompt="a boat", width=32, height=32, sampling_steps=3, seed=1, callback=lambda i, *_: steps.append(i)
    )


def test_a_small_file_is_refused_at_once(tmp_path: Path, state: State) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.w2: a scale of its GGUF Q8_0"):
        load_transformer(gguf_file(tmp_path / "m.gguf", state, HURT), torch.float32)


@pytest.mark.usefixtures("large")
def test_a_large_file_is_refused_before_its_last_step(tmp_path: Path, state: State, model_folder: Path) -> None:
    steps: list[int] = []
    with pytest.raises(CheckpointError, match=r"m\.gguf: layers\.1\.feed_forward\.w2: a scale of its GGUF Q8_0"):
        draw(gguf_file(tmp_path / "m.gguf", state, HURT), model_folder, steps)
    assert 2 not in steps


def nf4(weight: torch.Tensor) -> State:
    codes, quant_state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return {"weight": codes} | {f"weight.{suffix}": t for suffix, t in quant_state.as_dict(packed=True).items()}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("pack", "scale", "says"),
    [
        pytest.param(comfy_int8.quantize, "weight_scale", "weight_scale holds NaN or infinity", id="int8"),
        pytest.param(quanto_int8.quantize, "weight._scale", "weight._scale holds NaN or infinity", id="quanto"),
        pytest.param(fp8_scaled.quantize, "weight_scale", "weight_scale holds NaN or infinity", id="FP8"),
        pytest.param(nvfp4.quantize, "weight_scale", "weight_scale holds NaN or negative numbers", id="NVFP4"),
        pytest.param(mxfp8.quantize, "weight_scale", "weight_scale holds NaN", id="MXFP8"),
        pytest.param(nf4, "weight.nested_absmax", "weight.nested_absmax holds NaN or infinity", id="nf4"),
    ],
)
def test_scales_of_every_format_are_looked_through_beside_the_drawing(
    tmp_path: Path, state: State, pack: Callable[[torch.Tensor], State], scale: str, says: str
) -> None:
    module = HURT.removesuffix(".weight")
    packed = pack(state[HURT])
    bits = packed[scale].flatten().view(torch.uint8)
    bits[:] = 0xFF  # NaN in every type
    tensors = {name: tensor for name, tensor in state.items() if name != HURT}
    save_file(tensors | {f"{module}.{suffix}": t for suffix, t in packed.items()}, tmp_path / "m.safetensors")

    model = load_transformer(tmp_path / "m.safetensors", torch.float32, keep_mapped=True)

    assert model.number_checks.left == 1
    with pytest.raises(CheckpointError, match=rf"{re.escape(module)}: {re.escape(says)}"):
        model.number_checks.finish()


@pytest.mark.usefixtures("large")
def test_a_sound_large_file_draws_what_it_would(
    tmp_path: Path, state: State, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_file(tmp_path / "m.gguf", state)
    left = load_transformer(path, torch.float32).number_checks.left
    picture = draw(path, model_folder, [])
    monkeypatch.undo()
    assert left > 8  # the packed linears' checks were still to be made, and then were
    at_once = draw(path, model_folder, [])
    assert picture is not None and at_once is not None
    torch.testing.assert_close(picture, at_once, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("large")
def test_a_large_text_encoder_gives_no_features_of_bad_scales(tmp_path: Path, model_folder: Path) -> None:
    folder = model_folder / "text_encoder"
    state = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    path = gguf_file(tmp_path / "te.gguf", state, HURT_ENCODER)
    encoder = TextEncoder(load_text_encoder(path, torch.float32), load_tokenizer(folder))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"te\.gguf: layers\.0\.mlp\.down_proj: a scale"):
            encoder.encode(["a boat"], torch.device("cpu"))

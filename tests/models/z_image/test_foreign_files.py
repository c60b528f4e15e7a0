"""Files that other programs' packages made are drawn from: of the demo's weights, and the pictures are the demo's.

convert_to_quant, which is not installed with the tests, made its files of a tiny network once (convert_to_quant/).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy_kitchen
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from comfy_kitchen.tensor import QuantizedTensor, TensorWiseINT8Layout
from diffusers import ZImageTransformer2DModel
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file, save_file

from models.z_image.loader import load_transformer, to_diffusers
from models.z_image.z_image_main import model_factory
from shared.app.context import default_root
from shared.app.picture_metrics import psnr
from shared.quant.formats import marker_tensor
from shared.quant.linear import PackedLinear
from tests.support.packed_model import State, linears_of, official_names

DEMO = default_root() / "models/z_image/demo"
CTQ = Path(__file__).parent / "convert_to_quant"


@pytest.fixture(scope="module")
def state() -> State:
    """The demo's weights in official names."""
    ours = load_transformer(DEMO / "transformer.safetensors", torch.bfloat16).state_dict()
    return {name: tensor.contiguous() for name, tensor in official_names(to_diffusers(ours)).items()}


def packed_of(state: State) -> list[str]:
    """What all these programs pack: attention and feed-forward."""
    return [module for module in linears_of(state) if ".attention." in module or ".feed_forward." in module]


def by_gguf(state: State, path: Path) -> Path:
    writer = GGUFWriter(path.with_suffix(".gguf"), "lumina2")
    for name, tensor in state.items():
        is_packed = name.removesuffix(".weight") in packed_of(state)
        kind = GGMLQuantizationType.Q8_0 if is_packed else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix(".gguf")


def by_comfy_kitchen(layout: str) -> Callable[[State, Path], Path]:
    def write(state: State, path: Path) -> Path:
        tensors = dict(state)
        for module in packed_of(state):
            weight = tensors.pop(f"{module}.weight")
            found = QuantizedTensor.from_float(weight, layout).state_dict("weight")
            tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in found.items()}
        save_file(tensors, path)
        return path

    return write


def by_comfy_kitchen_convrot(state: State, path: Path) -> Path:
    tensors = dict(state)
    marker = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    for module in packed_of(state):
        codes, params = TensorWiseINT8Layout.quantize(
            state[f"{module}.weight"], per_channel=True, convrot=True, convrot_groupsize=64
        )
        tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": params.scale}
        tensors[f"{module}.comfy_quant"] = marker_tensor(marker)
    save_file(tensors, path)
    return path


def by_mmgp(state: State, path: Path) -> Path:
    """optimum-quanto's int8, as mmgp saves it."""
    pytest.importorskip("shared.app.mmgp_engine")  # it restores what importing mmgp replaces
    from mmgp import offload

    ours = load_transformer(DEMO / "transformer.safetensors", torch.bfloat16)
    config = ours.config.as_diffusers()
    model = ZImageTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    model.load_state_dict(to_diffusers(ours.state_dict()))
    path.with_name("config.json").write_text(json.dumps(config))
    offload.save_model(
        model.to(torch.bfloat16), str(path), do_quantize=True, config_file_path=str(path.with_name("config.json"))
    )
    return path


def by_bitsandbytes(state: State, path: Path) -> Path:
    tensors = dict(state)
    for module in packed_of(state):
        name = f"{module}.weight"
        codes, found = quantize_4bit(tensors[name], quant_type="nf4", compress_statistics=True)
        tensors[name] = codes
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in found.as_dict(packed=True).items()}
    save_file(tensors, path)
    return path


def draw(transformer: Path, parts: Path = DEMO, **settings: Any) -> torch.Tensor:
    """A picture, uint8 (3, 1, H, W)."""
    encoder = parts / "text_encoder"
    processor = model_factory(
        model_filename=[transformer],
        text_encoder_filename=encoder / "model.safetensors",
        vae_filename=parts / "vae" / "diffusion_pytorch_model.safetensors",
        tokenizer_folder=encoder,
        dtype=torch.float32,
    )
    has_packed = any(isinstance(module, PackedLinear) for module in processor.transformer.modules())
    assert has_packed == (transformer.stem == "packed")
    wishes = {"input_prompt": "a red circle on a white background", "seed": 5, "width": 256, "height": 256}
    pictures = processor.generate(**wishes | {"sampling_steps": 4} | settings)
    assert pictures is not None
    return ((pictures + 1) * 127.5).round().byte()


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return draw(DEMO / "transformer.safetensors")


@pytest.mark.parametrize(
    ("write", "decibels"),
    [
        pytest.param(by_gguf, 40, id="gguf Q8_0"),
        pytest.param(by_comfy_kitchen("TensorCoreFP8Layout"), 35, id="comfy-kitchen FP8"),
        pytest.param(by_comfy_kitchen("TensorCoreMXFP8Layout"), 35, id="comfy-kitchen MXFP8"),
        pytest.param(by_comfy_kitchen("TensorCoreNVFP4Layout"), 28, id="comfy-kitchen NVFP4"),
        pytest.param(by_comfy_kitchen_convrot, 40, id="comfy-kitchen ConvRot"),
        pytest.param(by_mmgp, 40, id="mmgp, optimum-quanto"),
        pytest.param(by_bitsandbytes, 28, id="bitsandbytes nf4"),
    ],
)
def test_the_picture_is_the_demos(
    tmp_path: Path, state: State, picture: torch.Tensor, write: Callable[[State, Path], Path], decibels: float
) -> None:
    drawn = draw(write(state, tmp_path / "packed.safetensors"))

    assert psnr(drawn.numpy(), picture.numpy()) > decibels


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_a_whole_file_of_convert_to_quant_draws_what_its_numbers_do(
    tmp_path: Path, model_folder: Path, name: str
) -> None:
    file = shutil.copy(CTQ / f"{name}.safetensors", tmp_path / "packed.safetensors")
    tensors, plain = load_file(file), {}
    for key, tensor in tensors.items():
        module, _, suffix = key.rpartition(".")
        if suffix == "weight" and f"{module}.comfy_quant" in tensors:
            plain[key] = unpacked({s: tensors[f"{module}.{s}"] for s in ("weight", "weight_scale", "weight_scale_2")
                                   if f"{module}.{s}" in tensors})  # fmt: skip
        elif suffix not in ("comfy_quant", "weight_scale", "weight_scale_2", "input_scale"):
            plain[key] = tensor
    save_file(plain, tmp_path / "plain.safetensors")

    ours, theirs = (
        draw(tmp_path / f"{which}.safetensors", model_folder, width=64, height=48, sampling_steps=2)
        for which in ("packed", "plain")
    )

    assert int((ours.int() - theirs.int()).abs().max()) <= 1


def unpacked(layer: State) -> torch.Tensor:
    """What comfy-kitchen says convert_to_quant's tensors stand for."""
    scale = layer["weight_scale"]
    if "weight_scale_2" in layer:
        return comfy_kitchen.dequantize_nvfp4(layer["weight"], layer["weight_scale_2"], scale, torch.float32)
    return comfy_kitchen.dequantize_mxfp8(layer["weight"], scale.view(torch.float8_e8m0fnu), torch.float32)

"""GGUF files as stable-diffusion.cpp's converter leaves them, written by the gguf package after its rules.

What `sd-cli -M convert` does (commit 97d29908: src/convert.cpp, src/model_loader.cpp tensor_should_be_converted,
src/model_io/gguf_io.cpp, src/name_conversion.cpp):

* no keys at all, not even an architecture; tensors carry `model.diffusion_model.` after --diffusion-model, and what
  they had in the file after -m;
* a tensor is packed unless its rows are no whole blocks, or its name ends in .bias or .scale, or holds final_layer.,
  x_embedder., t_embedder. and the like: norms, pad tokens and a second time embedding are packed;
* whatever is not packed keeps its type; ggml knows no leading dimensions of 1, so pad tokens have one dimension;
* with --convert-name diffusers' q, k and v are called qkv.weight, qkv.weight.1 and qkv.weight.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from models.z_image.loader import load_transformer
from models.z_image.transformer import ZImageTransformer
from shared.app.inspection import inspect_path
from shared.quant.checkpoint import Checkpoint
from tests.support.gguf_blocks import random_blocks
from tests.support.packed_model import State, assert_same_network, official_names
from tests.support.tiny_model import TINY, randomise

PREFIX = "model.diffusion_model."
_KEPT_PARTS = ("final_layer.", "x_embedder.", "t_embedder.", "y_embedder.", "pos_embed", "context_embedder.",
               "time_embed.", "label_emb.", "embedding", "img_in.", "txt_in.", "time_in.")  # fmt: skip
_SOURCE_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def kind_of(name: str, tensor: torch.Tensor, asked: str) -> str:
    """The type that the converter gives a tensor when `asked` is to be it."""
    block = GGML_QUANT_SIZES[GGMLQuantizationType[asked]][0]
    named = name.endswith((".bias", ".scale", ".weight_scale")) or any(part in name for part in _KEPT_PARTS)
    return _SOURCE_TYPES[tensor.dtype] if named or tensor.shape[-1] % block else asked


def convert_name(name: str) -> str:
    """A name of diffusers after --convert-name, which looks behind the prefix only."""
    name = re.sub(r"all_(x_embedder|final_layer)\.2-1", r"\1", name)
    name = name.replace("to_out.0", "out").replace("norm_q.", "q_norm.").replace("norm_k.", "k_norm.")
    number = {"q": "", "k": ".1", "v": ".2"}
    return re.sub(r"attention\.to_([qkv])\.weight", lambda m: f"attention.qkv.weight{number[m[1]]}", name)


def converted(folder: Path, state: Mapping[str, torch.Tensor], kind: str, plain_names: Mapping[str, str]) -> Path:
    """m.gguf as the converter would leave it, and plain.safetensors: the same numbers, unpacked by the gguf package.

    plain_names: what plain.safetensors calls the tensors that it calls otherwise.
    """
    writer = GGUFWriter(folder / "m.gguf", "")
    writer.kv_data[0].clear()
    plain: State = {}
    for seed, (name, tensor) in enumerate(state.items()):
        chosen = kind_of(name, tensor, kind)
        flat = tensor.flatten() if math.prod(tensor.shape) == tensor.shape[-1] else tensor
        if "_K" in chosen:
            data = random_blocks(chosen, flat.numel() // flat.shape[-1], flat.shape[-1], seed=seed, scale=2e-4)
        else:
            data = quantize(flat.float().numpy(), GGMLQuantizationType[chosen])
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[chosen])
        numbers = torch.from_numpy(dequantize(data, GGMLQuantizationType[chosen]).copy())
        plain[plain_names.get(name, name)] = numbers.view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(plain, folder / "plain.safetensors")
    return folder / "m.gguf"


def source(model: torch.nn.Module) -> State:
    """Its numbers as published files keep them."""
    return {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("kind", "prefix"), [("Q8_0", ""), ("Q4_0", PREFIX), ("Q3_K", PREFIX)])
def test_a_converted_file_is_the_network_of_its_numbers(
    tmp_path: Path, reference_transformer: ZImageTransformer2DModel, kind: str, prefix: str
) -> None:
    state = {prefix + name: tensor for name, tensor in official_names(source(reference_transformer)).items()}
    file = converted(tmp_path, state, kind, {})
    tensors = Checkpoint.open(file).tensors
    packed = {name.removeprefix(prefix) for name, t in tensors.items() if kind in (t.stored or t.dtype)}
    # Rows of 384 are no whole blocks of 256, and stay; those of w2 and adaLN, which are, do not.
    norms = {"x_pad_token", "cap_pad_token", "layers.0.attention.q_norm.weight", "noise_refiner.0.ffn_norm1.weight"}
    assert {"layers.1.feed_forward.w2.weight", "layers.0.adaLN_modulation.0.weight"} <= packed
    assert norms <= packed if kind != "Q3_K" else not norms & packed

    model = load_transformer(file, torch.float32)

    assert model.config == TINY
    assert_same_network(model, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)


@pytest.mark.parametrize("renamed", [False, True], ids=["names kept", "--convert-name"])
def test_a_file_from_diffusers_names_is_the_network_of_its_numbers(
    tmp_path: Path, reference_transformer: ZImageTransformer2DModel, renamed: bool
) -> None:
    theirs = source(reference_transformer)
    names = {name: PREFIX + (convert_name(name) if renamed else name) for name in theirs}
    assert (f"{PREFIX}layers.0.attention.qkv.weight.2" in names.values()) == renamed
    diffusers = {found: PREFIX + name for name, found in names.items()}
    file = converted(tmp_path, {names[n]: tensor.contiguous() for n, tensor in theirs.items()}, "Q8_0", diffusers)

    model = load_transformer(file, torch.float32)

    assert_same_network(model, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)


def test_a_second_time_embedding_may_be_packed(tmp_path: Path) -> None:
    """TwinFlow's t_embedder_2, which the rule for t_embedder. does not cover."""
    config = replace(TINY, has_second_time=True)
    state = source(randomise(ZImageTransformer(config), seed=5))
    file = converted(tmp_path, state, "Q4_0", {})
    assert Checkpoint.open(file).tensors["t_embedder_2.mlp.0.weight"].dtype == "GGUF_Q4_0"

    model = load_transformer(file, torch.float32)

    assert model.config == config
    assert_same_network(model, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)


def test_a_converted_all_in_one_checkpoint_says_what_is_in_it_and_loads(
    tmp_path: Path, reference_transformer: ZImageTransformer2DModel
) -> None:
    state = {PREFIX + name: tensor for name, tensor in official_names(source(reference_transformer)).items()}
    state["text_encoders.qwen3_4b.transformer.model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    state["vae.decoder.norm_out.weight"] = torch.ones(128, dtype=torch.bfloat16)
    file = converted(tmp_path, state, "Q8_0", {})

    (found,) = inspect_path(file, {"z_image": None})
    model = load_transformer(file, torch.float32)

    assert (found["kind"], found["contains"]) == ("checkpoint", ["transformer", "text encoder", "VAE"])
    assert found["problems"] == []
    assert_same_network(model, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)

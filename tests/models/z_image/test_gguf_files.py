"""GGUF files of the tiny Z-Image and its text encoder, written by the gguf package as others' converters write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3Model

from models.z_image.loader import load_transformer
from models.z_image.text_encoder import load_text_encoder
from shared.app.inspection import inspect_path
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError, LayerMismatchError
from shared.quant.linear import PackedLinear
from tests.support.gguf_blocks import random_blocks
from tests.support.packed_model import State, assert_same_network, forward, official_names
from tests.support.tiny_model import TINY, randomise, relative_error

# A tensor's name and shape -> how the file keeps it.
Choice = Callable[[str, torch.Size], str]

PADS = ("x_pad_token", "cap_pad_token")


@pytest.fixture
def state(reference_transformer: ZImageTransformer2DModel) -> State:
    return official_names(reference_transformer.state_dict())


def write_pair(
    folder: Path, state: Mapping[str, torch.Tensor], choose: Choice, architecture: str = "lumina2"
) -> tuple[Path, Path]:
    """A GGUF file by the gguf package, and the same numbers, unpacked by it, as float32 safetensors."""
    writer = GGUFWriter(folder / "m.gguf", architecture)
    plain: State = {}
    for i, (name, tensor) in enumerate(state.items()):
        kind = choose(name, tensor.shape)
        data = packed_bytes(tensor, kind, seed=i)
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
        plain[name] = torch.from_numpy(dequantize(data, GGMLQuantizationType[kind]).copy()).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(plain, folder / "plain.safetensors")
    return folder / "m.gguf", folder / "plain.safetensors"


def packed_bytes(tensor: torch.Tensor, kind: str, seed: int) -> numpy.ndarray:
    """What the package packs it to; bytes of its own making for types that no package packs."""
    if "_K" in kind or kind.startswith("IQ"):
        return random_blocks(kind, *tensor.shape, seed=seed, scale=2e-4)
    return quantize(tensor.float().numpy(), GGMLQuantizationType[kind])


def city96(kind: str) -> Choice:
    """Norms, biases and embedders as they are, refiners unpacked, matrices of the trunk in `kind` where it fits."""

    def choose(name: str, shape: torch.Size) -> str:
        if len(shape) == 1:
            return "F32"
        if not name.startswith("layers."):
            return "BF16"
        return kind if shape[-1] % (256 if "_K" in kind or kind == "IQ4_XS" else 32) == 0 else "Q8_0"

    return choose


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_a_converted_file_is_the_network_of_its_unpacked_weights(tmp_path: Path, state: State, kind: str) -> None:
    packed, plain = write_pair(tmp_path, state, city96(kind))

    model = load_transformer(packed, torch.float32)

    assert f"gguf_{kind.lower()}" in {m.packing.name for m in model.modules() if isinstance(m, PackedLinear)}
    assert_same_network(model, load_transformer(plain, torch.float32), tmp_path)


def test_pad_tokens_typed_as_bytes_load(tmp_path: Path, state: State) -> None:
    as_bytes = {n: t.bfloat16().view(torch.int8) if n in PADS else t for n, t in state.items()}
    writer = GGUFWriter(tmp_path / "m.gguf", "pig")
    for name, tensor in as_bytes.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = load_transformer(tmp_path / "m.gguf", torch.float32)

    assert torch.equal(model.x_pad_token, state["x_pad_token"].bfloat16().float())


def test_weights_stay_mapped_from_the_file(tmp_path: Path, state: State) -> None:
    packed, _ = write_pair(tmp_path, state, city96("Q8_0"))
    model = load_transformer(packed, torch.float32)
    before = forward(model)
    raw = bytearray(packed.read_bytes())
    info = Checkpoint.open(packed).tensors["layers.0.feed_forward.w2.weight"]
    raw[info.offset + 2 : info.offset + 34] = bytes([127] * 32)

    with packed.open("r+b") as stream:
        stream.write(raw)

    assert not torch.equal(forward(model), before), "a copy would not have seen the change"


def test_a_truncated_file_and_a_foreign_one_are_named(tmp_path: Path, state: State) -> None:
    packed, _ = write_pair(tmp_path, state, city96("Q8_0"))
    packed.write_bytes(packed.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"m\.gguf: .* ends at byte"):
        load_transformer(packed, torch.float32)

    write_pair(tmp_path, {"blk.0.attn_q.weight": torch.zeros(32, 32)}, city96("Q8_0"))
    with pytest.raises(LayerMismatchError, match="no Z-Image transformer"):
        load_transformer(packed, torch.float32)


# --------------------------------------------------------------------------------------------------- text encoder

LLAMA_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder_state() -> State:
    config = Qwen3Config(
        vocab_size=40, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    return randomise(Qwen3Model(config), 3).state_dict()


def llama_names(state: State) -> State:
    result = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
        module = layer[2] if layer else name.removesuffix(".weight")
        result[f"{f'blk.{layer[1]}.' if layer else ''}{LLAMA_NAMES[module]}.weight"] = tensor
    return result


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_a_qwen3_of_llama_cpp_is_the_encoder_of_its_unpacked_weights(
    tmp_path: Path, encoder_state: State, kind: str
) -> None:
    packed, plain = write_pair(
        tmp_path, llama_names(encoder_state), lambda _, shape: "F32" if len(shape) == 1 else kind, "qwen3"
    )
    unpacked = Checkpoint.open(plain).load()
    theirs = {f"model.{n}": unpacked[llama] for n, llama in zip(encoder_state, llama_names(encoder_state), strict=True)}
    save_file(theirs, tmp_path / "hf.safetensors")
    ids = torch.tensor([[1, 7, 30, 2, 2, 39]])

    ours = load_text_encoder(packed, torch.float32)
    expected = load_text_encoder(tmp_path / "hf.safetensors", torch.float32)

    assert sum(isinstance(m, PackedLinear) for m in ours.modules()) == 2 * 7
    with torch.no_grad():
        features, reference = ours(input_ids=ids).last_hidden_state, expected(input_ids=ids).last_hidden_state
    assert relative_error(features, reference) <= 1e-5


# --------------------------------------------------------------------------------------------------------- inspect


def test_gguf_files_say_what_they_are(tmp_path: Path, state: State, encoder_state: State) -> None:
    (tmp_path / "encoder").mkdir()
    transformer, _ = write_pair(tmp_path, state, city96("Q4_K"))
    encoder, _ = write_pair(tmp_path / "encoder", llama_names(encoder_state), city96("Q8_0"), "qwen3")

    (found,) = inspect_path(transformer, {"z_image": None})
    assert (found["kind"], found["naming"], found["problems"]) == ("transformer", "official", [])
    assert {"GGUF Q4_K", "GGUF Q8_0", "BF16", "F32"} <= found["formats"].keys()
    assert found["sizes"]["dim"] == TINY.dim
    assert found["metadata"] == {"general.architecture": "lumina2"}
    (found,) = inspect_path(encoder, {"z_image": None})
    assert (found["kind"], found["sizes"]) == ("text_encoder", {"vocabulary": 40, "hidden": 256, "layers": 3})

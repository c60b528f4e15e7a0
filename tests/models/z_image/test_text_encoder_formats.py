"""Qwen3 in quanto int8 as mmgp writes it, in ComfyUI's formats: the features of its dequantized weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import TensorCoreFP8Layout, TensorWiseINT8Layout
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen3ForCausalLM, Qwen3Model

from models.z_image.inspection import describe
from models.z_image.text_encoder import load_text_encoder
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError
from shared.quant.formats import fp8_scaled, marker_tensor
from shared.quant.linear import PackedLinear
from tests.support.packed_model import State, linears_of
from tests.support.tiny_model import relative_error

COMFY_PREFIX = "text_encoders.qwen3_4b.transformer."


def features(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 40)[None], use_cache=False).last_hidden_state


def hidden_states(reference: Qwen3Model, weights: State) -> torch.Tensor:
    """hidden_states[-2] of the whole model with these weights, by transformers."""
    model = copy.deepcopy(reference)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 40)[None], output_hidden_states=True).hidden_states[-2]


@pytest.fixture
def state(reference_encoder: Qwen3Model) -> State:
    return {f"model.{name}": tensor.contiguous() for name, tensor in reference_encoder.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mmgps_file_with_packed_embeddings_and_a_tied_head(
    tmp_path: Path, reference_encoder: Qwen3Model, dtype: torch.dtype
) -> None:
    pytest.importorskip("shared.app.mmgp_engine")  # it restores what importing mmgp replaces
    from mmgp import offload
    from optimum.quanto import QTensor

    model = Qwen3ForCausalLM(reference_encoder.config)
    model.model.load_state_dict(reference_encoder.state_dict())
    model.to(dtype)
    path = tmp_path / "qwen3_quanto_bf16_int8.safetensors"
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    offload.save_model(model, str(path), do_quantize=True, config_file_path=str(tmp_path / "config.json"))
    written = Checkpoint.open(path)
    assert "model.embed_tokens.weight._data" in written.tensors
    assert "tied_weights_map_base64" in written.metadata, "says that lm_head.weight would be int8 codes"
    found = describe(written)
    assert found is not None
    assert (found["kind"], found["sizes"]) == ("text_encoder", {"vocabulary": 300, "hidden": 64, "layers": 3})
    weights = {
        n: (p.dequantize() if isinstance(p, QTensor) else p.data).float()
        for n, p in model.named_parameters()
        if n.startswith("model.")
    }

    ours = load_text_encoder(path, dtype)

    assert torch.equal(ours.embed_tokens.weight, weights["model.embed_tokens.weight"].to(dtype))
    q_proj = ours.layers[0].self_attn.q_proj
    assert isinstance(q_proj, PackedLinear)
    assert torch.equal(q_proj.dequantize(), weights["model.layers.0.self_attn.q_proj.weight"].to(dtype))
    if dtype == torch.float32:
        assert relative_error(features(ours), hidden_states(reference_encoder, weights)) <= 1e-5


@pytest.mark.parametrize("spelling", ["markers", "legacy", "plain cast", "int8 by row"])
def test_comfy_kitchens_weights_in_every_spelling(
    tmp_path: Path, reference_encoder: Qwen3Model, state: State, spelling: str
) -> None:
    tensors, plain = dict(state), dict(state)
    for module in linears_of(state):
        weight = state[f"{module}.weight"]
        if module.endswith("embed_tokens"):
            continue  # ComfyUI keeps the table in 16 bits
        if spelling == "plain cast":
            tensors[f"{module}.weight"] = weight.to(torch.float8_e4m3fn)
            plain[f"{module}.weight"] = tensors[f"{module}.weight"].float()
        elif spelling == "int8 by row":
            codes, int8_params = TensorWiseINT8Layout.quantize(weight, per_channel=True)
            tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": int8_params.scale}
            plain[f"{module}.weight"] = TensorWiseINT8Layout.dequantize(codes, int8_params)
        else:
            codes, params = TensorCoreFP8Layout.quantize(weight)
            scale = "weight_scale" if spelling == "markers" else "scale_weight"
            tensors |= {f"{module}.weight": codes, f"{module}.{scale}": params.scale}
            plain[f"{module}.weight"] = TensorCoreFP8Layout.dequantize(codes, params)
            if spelling == "markers":
                tensors[f"{module}.comfy_quant"] = marker_tensor({"format": "float8_e4m3fn"})
    if spelling == "legacy":
        tensors |= fp8_scaled.file_marker()
    tensors |= {"logit_scale": torch.ones(()), "lm_head.weight": torch.ones(300, 64)}  # not needed, left alone
    save_file({COMFY_PREFIX + name: tensor for name, tensor in tensors.items()}, tmp_path / "te.safetensors")

    ours = load_text_encoder(tmp_path / "te.safetensors", torch.float32)

    assert isinstance(ours.layers[1].mlp.down_proj, PackedLinear)
    assert relative_error(features(ours), hidden_states(reference_encoder, plain)) <= 1e-5


def test_an_embedding_table_cast_to_fp8_is_widened(tmp_path: Path, reference_encoder: Qwen3Model, state: State) -> None:
    cast = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    save_file(cast, tmp_path / "te.safetensors")

    ours = load_text_encoder(tmp_path / "te.safetensors", torch.float32)

    assert ours.embed_tokens.weight.dtype == torch.float32
    expected = hidden_states(reference_encoder, {name: tensor.float() for name, tensor in cast.items()})
    assert relative_error(features(ours), expected) <= 1e-5


def test_a_layer_without_its_scale_is_named(tmp_path: Path, state: State) -> None:
    codes, _ = TensorCoreFP8Layout.quantize(state["model.layers.0.mlp.up_proj.weight"])
    state["model.layers.0.mlp.up_proj.weight"] = codes
    state["model.layers.0.mlp.up_proj.comfy_quant"] = marker_tensor({"format": "float8_e4m3fn"})
    save_file(state, tmp_path / "te.safetensors")

    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj: .* has no weight_scale"):
        load_text_encoder(tmp_path / "te.safetensors", torch.float32)

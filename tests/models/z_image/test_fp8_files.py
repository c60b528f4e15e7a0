"""Whole FP8 files in every spelling, and files that mix them: the same network as their dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import TensorCoreFP8Layout
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

from models.z_image.loader import load_transformer, to_diffusers
from shared.quant.errors import CheckpointError, LayerMismatchError
from shared.quant.formats import comfy_int8, fp8_scaled, marker_tensor
from shared.quant.linear import JoinedLinear, PackedLinear
from tests.support.packed_model import State, assert_same_network, linears_of, official_names


@pytest.fixture(scope="module")
def state(reference_transformer: ZImageTransformer2DModel) -> State:
    return {name: tensor.contiguous() for name, tensor in reference_transformer.state_dict().items()}


def quantized_by_comfy_kitchen(state: State, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[State, State]:
    """The layers' weights as FP8 with their scales, the rest untouched; and the dequantized weights."""
    tensors, plain = dict(state), dict(state)
    for module in linears_of(state):
        if module.startswith("layers."):
            codes, params = TensorCoreFP8Layout.quantize(state[f"{module}.weight"], dtype=dtype)
            tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": params.scale}
            plain[f"{module}.weight"] = TensorCoreFP8Layout.dequantize(codes, params)
    return tensors, plain


def scaled_modules(tensors: State) -> list[str]:
    return [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]


def with_markers(tensors: State) -> tuple[State, dict[str, str] | None]:
    marked = {f"{m}.comfy_quant": marker_tensor({"format": "float8_e4m3fn"}) for m in scaled_modules(tensors)}
    inputs = {f"{m}.input_scale": torch.tensor(5.0) for m in scaled_modules(tensors)}
    return tensors | marked | inputs, None


def with_header_and_prefix(tensors: State) -> tuple[State, dict[str, str] | None]:
    layers = {m: {"format": "float8_e4m3fn"} for m in scaled_modules(tensors)}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return {f"model.diffusion_model.{n}": t for n, t in tensors.items()}, header


def legacy_behind_a_prefix(tensors: State) -> tuple[State, dict[str, str] | None]:
    renamed = {n.replace("weight_scale", "scale_weight"): t for n, t in tensors.items()}
    renamed |= fp8_scaled.file_marker() | {f"{m}.scale_input": torch.tensor(5.0) for m in scaled_modules(tensors)}
    return {f"model.diffusion_model.{n}": t for n, t in renamed.items()}, None


SPELLINGS = {
    "markers": with_markers,
    "header, prefix": with_header_and_prefix,
    "legacy, prefix": legacy_behind_a_prefix,
    "names alone": lambda tensors: (tensors, None),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_weights(tmp_path: Path, state: State, spelling: str) -> None:
    tensors, plain = quantized_by_comfy_kitchen(official_names(state))
    spelled, metadata = SPELLINGS[spelling](tensors)
    save_file(spelled, tmp_path / "fp8.safetensors", metadata=metadata)

    model = load_transformer(tmp_path / "fp8.safetensors", torch.float32)

    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(packed) == 2 * 5  # qkv, out, w13, w2 and the modulation of two layers
    weights = {f"{n}.weight": m.dequantize() for n, m in packed.items()}
    ours = official_names(to_diffusers({n: p.data for n, p in model.named_parameters()} | weights))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_scaled_file_computes_and_takes_loras(tmp_path: Path, state: State, dtype: torch.dtype) -> None:
    tensors, plain = quantized_by_comfy_kitchen(state, dtype)  # diffusers names: q, k and v have a scale each
    save_file(tensors, tmp_path / "fp8.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")

    packed = load_transformer(tmp_path / "fp8.safetensors", torch.float32)

    assert isinstance(packed.layers[0].attention.qkv, PackedLinear)
    assert_same_network(packed, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_file_cast_to_fp8_with_everything_in_it(tmp_path: Path, state: State, dtype: torch.dtype) -> None:
    cast = {name: tensor.to(dtype) for name, tensor in official_names(state).items()}
    save_file(cast, tmp_path / "fp8.safetensors")
    save_file({name: tensor.float() for name, tensor in cast.items()}, tmp_path / "plain.safetensors")

    packed = load_transformer(tmp_path / "fp8.safetensors", torch.float32)

    assert {p.dtype for p in packed.parameters()} == {torch.float32}
    assert_same_network(packed, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)


def test_one_linear_of_parts_packed_differently(tmp_path: Path, state: State) -> None:
    tensors, plain = quantized_by_comfy_kitchen(state)
    name = "layers.0.attention.to_k"
    for suffix, tensor in comfy_int8.quantize(state[f"{name}.weight"]).items():
        tensors[f"{name}.{suffix}"] = tensor
    plain[f"{name}.weight"] = tensors[f"{name}.weight"] * tensors[f"{name}.weight_scale"]
    del tensors["layers.0.attention.to_v.weight_scale"]
    tensors["layers.0.attention.to_v.weight"] = plain["layers.0.attention.to_v.weight"]
    save_file(tensors, tmp_path / "mixed.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")

    packed = load_transformer(tmp_path / "mixed.safetensors", torch.float32)

    assert isinstance(packed.layers[0].attention.qkv, JoinedLinear)
    assert_same_network(packed, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)


def test_a_scale_without_its_weight_is_listed(tmp_path: Path, state: State) -> None:
    tensors, _ = quantized_by_comfy_kitchen(official_names(state))
    del tensors["layers.1.feed_forward.w2.weight"]
    save_file(tensors, tmp_path / "odd.safetensors")

    with pytest.raises(LayerMismatchError, match=r"1 missing \(layers\.1\.feed_forward\.w2\.weight\)"):
        load_transformer(tmp_path / "odd.safetensors", torch.float32)


def test_a_broken_scale_is_named_before_anything_is_drawn(tmp_path: Path, state: State) -> None:
    tensors, _ = quantized_by_comfy_kitchen(official_names(state))
    tensors["layers.1.attention.out.weight_scale"] = torch.tensor(torch.nan)
    save_file(tensors, tmp_path / "odd.safetensors")

    with pytest.raises(CheckpointError, match=r"odd\.safetensors: layers\.1\.attention\.out: weight_scale holds NaN"):
        load_transformer(tmp_path / "odd.safetensors", torch.float32)

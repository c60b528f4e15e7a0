"""NVFP4, MXFP8 and BF16 in one file: layer by layer as its recipe says, the same network as its unpacked weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

import models.z_image
from models.z_image import loader, lora
from models.z_image.loader import load_transformer
from shared.quant import mapping
from shared.quant.errors import CheckpointError
from shared.quant.formats import mxfp8, nvfp4
from shared.quant.linear import JoinedLinear, PackedLinear
from shared.quant.recipe import Recipe
from tests.support.packed_model import assert_same_network, forward, linears_of, official_names
from tests.support.tiny_model import relative_error

State = dict[str, torch.Tensor]
Quantize = Callable[[torch.Tensor], State]

MIXED = Path(models.z_image.__file__).parent / "recipes" / "nvfp4_mixed.json"
WRITERS = {"nvfp4": nvfp4.quantize, "mxfp8": mxfp8.quantize}
LAYOUTS = {"nvfp4": "TensorCoreNVFP4Layout", "mxfp8": "TensorCoreMXFP8Layout"}


@pytest.fixture
def state(reference_transformer: ZImageTransformer2DModel) -> State:
    return {name: tensor.contiguous() for name, tensor in reference_transformer.state_dict().items()}


def by_us(weight: torch.Tensor, name: str) -> State:
    return WRITERS[name](weight)


def by_comfy_kitchen(weight: torch.Tensor, name: str) -> State:
    """Without any marker: names, types and shapes must do."""
    return QuantizedTensor.from_float(weight, LAYOUTS[name]).state_dict("weight")


def unpacked(tensors: State) -> torch.Tensor:
    """What comfy-kitchen says a layer stands for, float32."""
    scale = tensors["weight_scale"]
    if "weight_scale_2" in tensors:
        return comfy_kitchen.dequantize_nvfp4(tensors["weight"], tensors["weight_scale_2"], scale, torch.float32)
    return comfy_kitchen.dequantize_mxfp8(tensors["weight"], scale.view(torch.float8_e8m0fnu), torch.float32)


def write(
    state: State, path: Path, choose: Callable[[str], str], quantize: Callable[..., State] = by_us, **header: str
) -> State:
    """Write a file whose linears are packed as `choose` says; returns the plain state that it stands for."""
    tensors, plain = dict(state), dict(state)
    for module in linears_of(state):
        name = choose(module)
        if name != "bf16":
            packed = quantize(tensors.pop(f"{module}.weight"), name)
            tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in packed.items()}
            plain[f"{module}.weight"] = unpacked(packed)
    save_file(tensors, path, metadata=header or None)
    return plain


def baseline(module: str) -> str:
    """The linears of blocks in NVFP4, all else kept."""
    return "nvfp4" if module.startswith(("layers.", "noise_refiner.", "context_refiner.")) else "bf16"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("quantize", [by_us, by_comfy_kitchen])
def test_the_mixed_recipes_file_is_the_network_of_its_unpacked_weights(
    tmp_path: Path, state: State, quantize: Callable[..., State], prefix: str
) -> None:
    recipe = Recipe.load(MIXED, ("nvfp4", "mxfp8", "bf16"))
    official = {prefix + name: tensor for name, tensor in official_names(state).items()}

    plain = write(official, tmp_path / "m.safetensors", lambda m: recipe.format_of(m.removeprefix(prefix)), quantize)

    save_file(plain, tmp_path / "plain.safetensors")
    model = load_transformer(tmp_path / "m.safetensors", torch.float32)
    kinds = {n: m.packing.name for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert kinds["layers.0.attention.qkv"] == "nvfp4" and kinds["layers.0.attention.out"] == "mxfp8"
    assert kinds["layers.0.feed_forward.w13"] == "nvfp4", "two tensor scales in one layer"
    assert kinds["noise_refiner.0.feed_forward.w13.parts.0"] == "mxfp8", "w1 beside w3 in BF16"
    assert type(model.noise_refiner[0].feed_forward.w13.parts[1]) is torch.nn.Linear
    assert type(model.context_refiner[0].attention.out) is torch.nn.Linear
    assert_same_network(model, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)


def test_q_k_and_v_may_each_be_packed_differently(tmp_path: Path, state: State) -> None:
    each = {"to_q": "nvfp4", "to_k": "mxfp8", "to_v": "bf16"}

    plain = write(state, tmp_path / "m.safetensors", lambda m: each.get(m.rpartition(".")[2], "bf16"))

    save_file(plain, tmp_path / "plain.safetensors")
    model = load_transformer(tmp_path / "m.safetensors", torch.float32)
    qkv = model.layers[0].attention.qkv
    assert isinstance(qkv, JoinedLinear)
    assert [p.packing.name for p in qkv.parts[:2]] == ["nvfp4", "mxfp8"]
    assert_same_network(model, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_split_q_k_and_v_of_one_packing_are_joined_into_one_layer(tmp_path: Path, state: State, name: str) -> None:
    plain = write(state, tmp_path / "m.safetensors", lambda m: name if ".to_" in m else "bf16")

    model = load_transformer(tmp_path / "m.safetensors", torch.float32)

    qkv = model.layers[1].attention.qkv
    assert isinstance(qkv, PackedLinear)
    expected = torch.cat([plain[f"layers.1.attention.to_{c}.weight"] for c in "qkv"])
    assert torch.equal(qkv.dequantize(), expected)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_a_large_file_for_the_cpu_is_not_copied_and_gives_the_same_bits(
    tmp_path: Path, state: State, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(state, tmp_path / "m.safetensors", lambda m: name if baseline(m) == "nvfp4" else "bf16")
    joined = load_transformer(tmp_path / "m.safetensors", torch.bfloat16, keep_mapped=True, compute="int8")
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)

    apart = load_transformer(tmp_path / "m.safetensors", torch.bfloat16, keep_mapped=True, compute="int8")

    packed = [m for m in apart.modules() if isinstance(m, PackedLinear)]
    assert len(packed) > len([m for m in joined.modules() if isinstance(m, PackedLinear)])
    for tensors in (layer.packed.tensors for layer in packed):
        assert {key for key, tensor in tensors.items() if not mapping.is_mapped(tensor)} <= {"tensor_scale"}
    assert torch.equal(forward(apart), forward(joined))


def test_the_headers_metadata_is_followed_when_layers_carry_no_marker(tmp_path: Path, state: State) -> None:
    official = official_names(state)
    layers = {m: {"format": "nvfp4", "group_size": 16} for m in linears_of(official) if baseline(m) == "nvfp4"}
    header = json.dumps({"format_version": "1.0", "layers": layers})

    plain = write(official, tmp_path / "m.safetensors", baseline, by_comfy_kitchen, _quantization_metadata=header)

    model = load_transformer(tmp_path / "m.safetensors", torch.float32)
    assert torch.equal(model.layers[0].attention.qkv.dequantize(), plain["layers.0.attention.qkv.weight"])


def test_the_error_correction_lora_takes_error_out_of_its_file(tmp_path: Path, state: State) -> None:
    """convert_to_quant --extract-lora: up = U * S and down = V of weight - file, official names, float32, no alpha.

    It corrects the first block of each kind only, unless told to go deeper; here, four of their layers.
    """
    corrected = [f"layers.0.{m}" for m in ("attention.qkv", "feed_forward.w1", "feed_forward.w3")]
    corrected += ["context_refiner.0.attention.out"]
    official = official_names(state)
    plain = write(official, tmp_path / "m.safetensors", baseline)
    pairs: State = {}
    for module in corrected:
        u, s, v = torch.linalg.svd(official[f"{module}.weight"] - plain[f"{module}.weight"], full_matrices=False)
        pairs[f"diffusion_model.{module}.lora_up.weight"] = (u[:, :32] * s[:32]).contiguous()
        pairs[f"diffusion_model.{module}.lora_down.weight"] = v[:32].contiguous()
    save_file(pairs, tmp_path / "m_lora.safetensors")
    save_file(official, tmp_path / "plain.safetensors")
    model = load_transformer(tmp_path / "m.safetensors", torch.float32)
    exact = load_transformer(tmp_path / "plain.safetensors", torch.float32)

    def weight_error(module: str) -> float:
        """Of what the layer computes, LoRA included."""
        layer, original = model.get_submodule(module), exact.get_submodule(module)
        ones = torch.eye(layer.in_features)
        return relative_error(layer(ones), original(ones))

    fused = ("layers.0.attention.qkv", "layers.0.feed_forward.w13", "context_refiner.0.attention.out")
    before = [weight_error(m) for m in fused]
    (match,) = lora.apply(model, [lora.read(tmp_path / "m_lora.safetensors")], [1.0])
    after = [weight_error(m) for m in fused]

    assert match.matched == 2 * len(corrected) and not match.unmatched
    assert all(0.09 < b < 0.1 for b in before)
    # Rank 32 of a matrix 384 wide: noise has its energy spread evenly, so about a tenth of the error goes.
    assert all(a < 0.95 * b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t.pop("layers.1.feed_forward.w2.weight_scale"), "layers.1.feed_forward.w2: its weight_scale is mis"),
        (lambda t: t.pop("layers.1.feed_forward.w2.weight_scale_2"), "its weight_scale_2 is missing"),
        (lambda t: t["layers.1.feed_forward.w2.weight_scale_2"].zero_(), "weight_scale_2 is 0.0"),
        (lambda t: t.pop("layers.1.feed_forward.w2.weight"), "layers.1.feed_forward.w2: its weight is missing"),
        (lambda t: t.update({"layers.1.feed_forward.w2.surplus": torch.zeros(1)}), r"1 unexpected \(.*surplus"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, state: State, spoil: Callable[[State], object], says: str) -> None:
    official = official_names(state)
    module = "layers.1.feed_forward.w2"
    tensors = official | {f"{module}.{s}": t for s, t in nvfp4.quantize(official[f"{module}.weight"]).items()}
    spoil(tensors)
    save_file(tensors, tmp_path / "damaged.safetensors")

    with pytest.raises(CheckpointError, match=says) as error:
        load_transformer(tmp_path / "damaged.safetensors", torch.float32)

    assert "damaged.safetensors" in str(error.value)

"""Whole int8 files, written by mmgp and comfy-kitchen: the same network as their own dequantized weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_kitchen.tensor import TensorWiseINT8Layout
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

from models.z_image import loader
from models.z_image.loader import load_transformer, to_diffusers
from models.z_image.transformer import ZImageTransformer
from shared.quant import mapping
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError, LayerMismatchError
from shared.quant.formats import marker_tensor, quanto_int8
from shared.quant.linear import PackedLinear
from shared.quant.packings import int8
from tests.support.packed_model import State, assert_same_network, forward, linears_of, official_names
from tests.support.tiny_model import TINY

# What no shape shows, to see that the header's config is read.
CONFIG = TINY.as_diffusers() | {"rope_theta": 300.0}


@pytest.fixture(scope="module")
def state(reference_transformer: ZImageTransformer2DModel) -> State:
    return {name: tensor.contiguous() for name, tensor in reference_transformer.state_dict().items()}


def dequantized(model: ZImageTransformer) -> State:
    """All weights of ours under diffusers' names, packed ones unpacked."""
    packed = {
        f"{name}.weight": module.dequantize()
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
    }
    plain = {name: parameter.data for name, parameter in model.named_parameters()}
    return to_diffusers(plain | packed)


def quantized_by_mmgp(
    folder: Path, reference: ZImageTransformer2DModel, dtype: torch.dtype
) -> tuple[Path, Mapping[str, torch.Tensor]]:
    """A file that mmgp wrote, and the model's weights as optimum-quanto dequantizes them."""
    pytest.importorskip("shared.app.mmgp_engine")  # it restores what importing mmgp replaces
    from mmgp import offload
    from optimum.quanto import QTensor

    model = copy.deepcopy(reference).to(dtype)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    path = folder / "quanto.safetensors"
    offload.save_model(model, str(path), do_quantize=True, config_file_path=str(folder / "config.json"))
    weights = {n: p.dequantize() if isinstance(p, QTensor) else p.data for n, p in model.named_parameters()}
    return path, weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mmgps_file_holds_the_weights_that_quanto_dequantizes(
    tmp_path: Path, reference_transformer: ZImageTransformer2DModel, dtype: torch.dtype
) -> None:
    path, expected = quantized_by_mmgp(tmp_path, reference_transformer, dtype)

    model = load_transformer(path, dtype)

    assert model.config.rope_theta == CONFIG["rope_theta"]
    ours = dequantized(model)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert all(isinstance(m, PackedLinear) and m.packing.name == "int8" for m in linears)


def test_mmgps_file_computes_and_takes_loras(tmp_path: Path, reference_transformer: ZImageTransformer2DModel) -> None:
    path, weights = quantized_by_mmgp(tmp_path, reference_transformer, torch.float32)
    save_file(dict(weights), tmp_path / "plain.safetensors", metadata={"config": json.dumps(CONFIG)})

    packed = load_transformer(path, torch.float32)

    assert_same_network(packed, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)


def test_numbers_that_mmgp_began_at_odd_bytes_are_read_at_whole_ones(
    tmp_path: Path, reference_transformer: ZImageTransformer2DModel
) -> None:
    path, _ = quantized_by_mmgp(tmp_path, reference_transformer, torch.bfloat16)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    odd = length % 2 == 0  # one more blank makes every offset in the file an odd one
    path.write_bytes((length + odd).to_bytes(8, "little") + data[8 : 8 + length] + b" " * odd + data[8 + length :])

    checkpoint = Checkpoint.open(path)

    assert any(t.dtype == "BF16" and t.offset % 2 for t in checkpoint.tensors.values())
    assert all(t.data_ptr() % t.element_size() == 0 for t in checkpoint.load().values())


def test_a_large_file_for_the_cpu_is_not_copied_and_gives_the_same_bits(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {n: t.to(torch.bfloat16) for n, t in state.items()}
    for module in (n for n in linears_of(state) if n.startswith("layers.") and "adaLN" not in n):
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{s}": t for s, t in quanto_int8.quantize(state[f"{module}.weight"]).items()}
    save_file(tensors, tmp_path / "m.safetensors")
    joined = load_transformer(tmp_path / "m.safetensors", torch.bfloat16, keep_mapped=True, compute="int8")
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)

    apart = load_transformer(tmp_path / "m.safetensors", torch.bfloat16, keep_mapped=True, compute="int8")

    packed = {name: m for name, m in apart.named_modules() if isinstance(m, PackedLinear)}
    assert {name.rpartition("layers.1.")[2] for name in packed if "layers.1." in name} == {
        "attention.qkv.parts.0", "attention.qkv.parts.1", "attention.qkv.parts.2", "attention.out",
        "feed_forward.w13.parts.0", "feed_forward.w13.parts.1", "feed_forward.w2",
    }  # fmt: skip
    assert all(mapping.is_mapped(m.packed.tensors["codes"]) for m in packed.values())
    assert torch.equal(forward(apart), forward(joined))


def test_mmgp_reads_what_we_write(tmp_path: Path, state: State) -> None:
    pytest.importorskip("shared.app.mmgp_engine")
    from mmgp import offload

    modules = linears_of(state)
    tensors = {n: t.to(torch.bfloat16) for n, t in state.items() if n.removesuffix(".weight") not in modules}
    for module in modules:
        quantized = quanto_int8.quantize(state[f"{module}.weight"])
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in quantized.items()}
    path = tmp_path / "ours.safetensors"
    save_file(tensors, path, metadata=quanto_int8.header(modules, CONFIG))
    with torch.device("meta"):
        theirs = ZImageTransformer2DModel(**{k: v for k, v in CONFIG.items() if not k.startswith("_")})

    offload.load_model_data(theirs.to(torch.bfloat16), str(path))

    ours = dequantized(load_transformer(path, torch.bfloat16))
    for module in modules:
        assert torch.equal(theirs.get_submodule(module).weight.dequantize(), ours[f"{module}.weight"])


def quantized_by_comfy_kitchen(state: State) -> tuple[State, State]:
    """A file as ComfyUI's: rotated layers, refiners by row or with one scale; and its dequantized weights."""
    tensors, plain = dict(state), dict(state)
    for module in linears_of(state):
        options: dict[str, Any] = {}
        marker: dict[str, Any] = {"format": "int8_tensorwise"}
        if module.startswith("layers."):
            options = {"per_channel": True, "convrot": True, "convrot_groupsize": 64}
            marker |= {"convrot": True, "convrot_groupsize": 64}
        elif module.startswith("noise_refiner."):
            options = {"per_channel": True}
        elif not module.startswith("context_refiner."):
            continue
        codes, params = TensorWiseINT8Layout.quantize(state[f"{module}.weight"], **options)
        tensors |= {
            f"{module}.weight": codes,
            f"{module}.weight_scale": params.scale,
            f"{module}.comfy_quant": marker_tensor(marker),
        }
        plain[f"{module}.weight"] = TensorWiseINT8Layout.dequantize(codes, params)
    return tensors, plain


def test_comfy_kitchens_file_computes_and_takes_loras(tmp_path: Path, state: State) -> None:
    tensors, plain = quantized_by_comfy_kitchen(official_names(state))
    save_file(tensors, tmp_path / "comfy.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")

    packed = load_transformer(tmp_path / "comfy.safetensors", torch.float32)

    rotated = packed.layers[0].feed_forward.w13
    assert isinstance(rotated, PackedLinear), "w1 and w3 are two tensors in the file and one linear here"
    assert rotated.packing == int8.Int8(rotation=64)
    assert not isinstance(packed.cap_embedder[1], PackedLinear)
    assert_same_network(packed, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)


def test_rows_of_another_size_are_listed(tmp_path: Path, state: State) -> None:
    tensors, _ = quantized_by_comfy_kitchen(official_names(state))
    tensors["layers.0.attention.out.weight"] = torch.ones(383, 384, dtype=torch.int8)
    save_file(tensors, tmp_path / "odd.safetensors")

    with pytest.raises(LayerMismatchError, match=r"layers\.0\.attention\.out\.weight is \[383, 384\], expected \[384"):
        load_transformer(tmp_path / "odd.safetensors", torch.float32)


def test_a_layer_without_its_scale_is_named(tmp_path: Path, state: State) -> None:
    tensors, _ = quantized_by_comfy_kitchen(official_names(state))
    del tensors["layers.1.attention.qkv.weight_scale"]
    save_file(tensors, tmp_path / "odd.safetensors")

    with pytest.raises(CheckpointError, match=r"odd\.safetensors: layers\.1\.attention\.qkv: .* has no weight_scale"):
        load_transformer(tmp_path / "odd.safetensors", torch.float32)

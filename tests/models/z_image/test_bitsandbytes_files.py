"""The tiny Z-Image with its matrices packed by bitsandbytes, in one file as diffusers saves such a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

from models.z_image import loader
from models.z_image.loader import load_transformer
from shared.quant.linear import PackedLinear
from shared.quant.mapping import is_mapped
from tests.support.packed_model import State, assert_same_network, forward, linears_of, official_names


def write(reference: ZImageTransformer2DModel, folder: Path, kind: str, *, official: bool) -> None:
    """packed.safetensors as bitsandbytes packs the network, plain.safetensors as it unpacks that."""
    state: State = {n: t.contiguous() for n, t in reference.state_dict().items()}
    packed = official_names(state) if official else dict(state)
    plain = dict(packed)
    for module in linears_of(packed):
        name = f"{module}.weight"
        codes, quant_state = quantize_4bit(packed[name], quant_type=kind, compress_statistics=True)
        plain[name] = dequantize_4bit(codes, quant_state)
        packed[name] = codes
        packed |= {f"{name}.{suffix}": t for suffix, t in quant_state.as_dict(packed=True).items()}
    save_file(packed, folder / "packed.safetensors")
    save_file(plain, folder / "plain.safetensors")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("naming", ["diffusers", "official"])
def test_a_file_is_the_network_of_its_unpacked_weights(
    tmp_path: Path, reference_transformer: ZImageTransformer2DModel, kind: str, naming: str
) -> None:
    write(reference_transformer, tmp_path, kind, official=naming == "official")

    model = load_transformer(tmp_path / "packed.safetensors", torch.float32)

    assert {m.packing.name for m in model.modules() if isinstance(m, PackedLinear)} == {kind}
    assert_same_network(model, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)


def test_a_large_file_for_the_cpu_is_not_copied(
    tmp_path: Path, reference_transformer: ZImageTransformer2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(reference_transformer, tmp_path, "nf4", official=False)
    joined = load_transformer(tmp_path / "packed.safetensors", torch.float32, keep_mapped=True)
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)

    apart = load_transformer(tmp_path / "packed.safetensors", torch.float32, keep_mapped=True)

    packed = {name: m for name, m in apart.named_modules() if isinstance(m, PackedLinear)}
    assert "layers.0.attention.qkv.parts.2" in packed and "layers.0.feed_forward.w13.parts.1" in packed
    assert all(is_mapped(layer.packed.tensors["codes"]) for layer in packed.values())
    torch.testing.assert_close(forward(apart), forward(joined))  # float32's products of fewer rows add in another order

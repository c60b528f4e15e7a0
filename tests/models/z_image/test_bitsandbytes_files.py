"""The tiny Z-Image with its matrices packed by bitsandbytes, in one file as diffusers saves such a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

from models.z_image.loader import load_transformer
from shared.quant.linear import PackedLinear
from tests.support.packed_model import State, assert_same_network, linears_of, official_names


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("naming", ["diffusers", "official"])
def test_a_file_is_the_network_of_its_unpacked_weights(
    tmp_path: Path, reference_transformer: ZImageTransformer2DModel, kind: str, naming: str
) -> None:
    state: State = {n: t.contiguous() for n, t in reference_transformer.state_dict().items()}
    packed = dict(official_names(state) if naming == "official" else state)
    plain = dict(packed)
    for module in linears_of(packed):
        name = f"{module}.weight"
        codes, quant_state = quantize_4bit(packed[name], quant_type=kind, compress_statistics=True)
        plain[name] = dequantize_4bit(codes, quant_state)
        packed[name] = codes
        packed |= {f"{name}.{suffix}": t for suffix, t in quant_state.as_dict(packed=True).items()}
    save_file(packed, tmp_path / "packed.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")

    model = load_transformer(tmp_path / "packed.safetensors", torch.float32)

    assert {m.packing.name for m in model.modules() if isinstance(m, PackedLinear)} == {kind}
    assert_same_network(model, load_transformer(tmp_path / "plain.safetensors", torch.float32), tmp_path)

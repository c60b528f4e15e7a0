"""The 6B model's size without its numbers: a sparse file, and random ones in small."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from models.z_image.config import TransformerConfig
from models.z_image.loader import load_transformer
from models.z_image.transformer import ZImageTransformer
from shared.bench.process_memory import memory_mib
from shared.quant import mapping
from shared.quant.checkpoint import Checkpoint
from shared.quant.formats import svdq
from shared.quant.linear import PackedLinear
from tests.support import big_files
from tests.support.big_files import Numbers, svdq_tensors, transformer_shapes, write_safetensors

_CONFIG = TransformerConfig(
    dim=384, n_layers=1, n_refiner_layers=1, n_heads=3, cap_feat_dim=64, ffn_dim=1024, time_dim=256,
    axes_dims=(32, 48, 48),
)  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files and Linux's account of memory")
def test_the_6b_model_is_opened_for_the_cpu_without_taking_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    shapes = transformer_shapes()
    write_safetensors(path, {name: ("BF16", shape) for name, shape in shapes.items()}, None)
    before = memory_mib()["RssAnon"]

    model = load_transformer(path, torch.bfloat16, keep_mapped=True)

    taken = memory_mib()["RssAnon"] - before
    assert sum(p.numel() for p in model.parameters()) == 6_154_908_736
    assert all(mapping.is_mapped(p) for p in model.parameters())
    assert taken < 0.05 * path.stat().st_size / 2**20


def test_random_weights_keep_the_size_of_what_goes_through_them(tmp_path: Path) -> None:
    numbers = Numbers()
    tensors = {
        "a.weight": ("BF16", (300, 256)), "norm.weight": ("BF16", (256,)), "a.bias": ("BF16", (300,)),
        "b.weight._data": ("I8", (300, 256)), "b.weight._scale": ("BF16", (300, 1)),
    }  # fmt: skip

    write_safetensors(tmp_path / "m.safetensors", tensors, numbers.quanto)

    loaded = Checkpoint.open(tmp_path / "m.safetensors").load()
    weight = loaded["a.weight"].float()
    assert math.isclose(float(weight.std()), 256**-0.5, rel_tol=0.02)
    assert weight.unique(dim=0).shape == weight.shape
    assert loaded["norm.weight"].unique().tolist() == [1] and loaded["a.bias"].unique().tolist() == [0]
    codes = loaded["b.weight._data"].float() * loaded["b.weight._scale"].float()
    assert math.isclose(float(codes.std()), 0.02, rel_tol=0.05)


@pytest.mark.parametrize(("kind", "rank", "gigabytes"), [("int4", 256, 4.54), ("fp4", 128, 4.20)])
def test_svdquant_files_are_as_large_as_the_published_ones(kind: str, rank: int, gigabytes: float) -> None:
    sizes = {"BF16": 2, "F8_E4M3": 1, "I8": 1}

    tensors = svdq_tensors(big_files._in_diffusers_names(transformer_shapes()), kind, rank)

    taken = sum(sizes[dtype] * math.prod(shape) for dtype, shape in tensors.values())
    assert math.isclose(taken / 1e9, gigabytes, rel_tol=0.01)


@pytest.mark.parametrize("kind", ["int4", "fp4"])
def test_random_svdquant_weights_compute_and_keep_sizes(tmp_path: Path, kind: str) -> None:
    with torch.device("meta"):
        network = ZImageTransformer(_CONFIG)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    tensors = svdq_tensors(big_files._in_diffusers_names(shapes), kind, 16)
    header = svdq.header(_CONFIG.as_diffusers(), kind=kind, rank=16)  # type: ignore[arg-type]
    write_safetensors(tmp_path / "m.safetensors", tensors, Numbers().svdq(kind), metadata=header)

    model = load_transformer(tmp_path / "m.safetensors", torch.float32)

    layer = model.layers[0].feed_forward.w2
    given = torch.randn(8, layer.in_features)
    assert isinstance(layer, PackedLinear)
    assert 0.3 < float(layer(given).std()) < 3

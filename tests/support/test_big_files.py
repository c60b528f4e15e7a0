"""The 6B model's size without its numbers: a sparse file, and random ones in small."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from models.z_image.loader import load_transformer
from shared.bench.process_memory import memory_mib
from shared.quant import mapping
from shared.quant.checkpoint import Checkpoint
from tests.support.big_files import Numbers, transformer_shapes, write_safetensors


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

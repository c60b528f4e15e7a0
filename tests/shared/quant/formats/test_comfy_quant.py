"""NVFP4 and MXFP8 layers are handed on as they lie in the file, and padding is no part of them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError
from shared.quant.formats import Layer, layers_of, mxfp8, nvfp4, read_checked
from shared.quant.mapping import is_mapped
from shared.quant.swizzle import swizzle, unswizzle

Tensors = dict[str, torch.Tensor]

each_format = pytest.mark.parametrize("module", [nvfp4, mxfp8], ids=["nvfp4", "mxfp8"])
SCALES = {"nvfp4": "block_scales", "mxfp8": "exponents"}
BLOCKS = {"nvfp4": 6, "mxfp8": 3}  # in a row of 96


def written(module: ModuleType, rows: int) -> Tensors:
    weight = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)) * 0.02
    tensors: Tensors = module.quantize(weight)
    return tensors


def layer(path: Path, tensors: Tensors) -> Layer:
    save_file({f"m.{suffix}": tensor for suffix, tensor in tensors.items()}, path)
    checkpoint = Checkpoint.open(path)
    return layers_of(checkpoint, checkpoint.tensors)["m"]


def lightx2v(tensors: Tensors) -> Tensors:
    above = 1 / tensors["weight_scale_2"]
    return {"weight": tensors["weight"], "weight_scale": tensors["weight_scale"], "weight_global_scale": above}


@pytest.mark.parametrize("rows", [128, 160])
@pytest.mark.parametrize("spelling", ["nvfp4", "mxfp8", "LightX2V"])
def test_a_layer_is_read_without_a_copy(spelling: str, rows: int, tmp_path: Path) -> None:
    module = mxfp8 if spelling == "mxfp8" else nvfp4
    tensors = written(module, rows)
    found = layer(tmp_path / "m.safetensors", lightx2v(tensors) if spelling == "LightX2V" else tensors)

    packed = module.read(found)

    assert is_mapped(packed.tensors["codes"])
    assert is_mapped(packed.tensors[SCALES[packed.packing.name]])
    assert all(len(tensor) == rows for tensor in packed.tensors.values() if not is_mapped(tensor))


def with_padding_of(byte: int, module: ModuleType, *, zeros: bool = False) -> Tensors:
    """A layer of 160 rows whose scales are padded with this byte, and its own are zero where asked for."""
    tensors, blocks = written(module, 160), BLOCKS[module.NAME.lower()]
    stored = tensors["weight_scale"]
    natural = torch.full(stored.shape, byte, dtype=torch.uint8)
    natural[:160, :blocks] = 0 if zeros else unswizzle(stored.view(torch.uint8), 160, blocks)
    return tensors | {"weight_scale": swizzle(natural).view(stored.dtype)}


@each_format
def test_what_padding_holds_is_nobodys_business(module: ModuleType, tmp_path: Path) -> None:
    spoilt = layer(tmp_path / "spoilt.safetensors", with_padding_of(0xFF, module))
    sound = layer(tmp_path / "sound.safetensors", written(module, 160))

    packed = read_checked(module, spoilt)

    assert torch.equal(packed.dequantize(torch.float32), module.read(sound).dequantize(torch.float32))


@each_format
def test_scales_of_zero_are_found_behind_padding_that_is_not(module: ModuleType, tmp_path: Path) -> None:
    lost = layer(tmp_path / "m.safetensors", with_padding_of(1, module, zeros=True))

    with pytest.raises(CheckpointError, match="weight_scale is zero throughout"):
        read_checked(module, lost)

"""GGUF matrices from a float weight to a file and back, and matrices that cannot be right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize

from shared.quant import gguf_file
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError
from shared.quant.formats import Layer, format_of, gguf, layers_of, read_checked
from shared.quant.gguf_file import Source
from tests.support.gguf_blocks import random_blocks

# Relative errors on normal numbers, rounded up from what was measured.
ERRORS = {"Q8_0": 0.007, "Q5_1": 0.042, "Q5_0": 0.048, "Q4_1": 0.085, "Q4_0": 0.097}


def layer_in(path: Path, blocks: torch.Tensor, type_name: str) -> Layer:
    """The only layer of a file that the gguf package wrote."""
    writer = GGUFWriter(path, "lumina2")
    writer.add_tensor("layers.0.w.weight", blocks.numpy(), raw_dtype=GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = Checkpoint.open(path)
    return layers_of(checkpoint, checkpoint.tensors)["layers.0.w"]


@pytest.mark.parametrize("type_name", gguf.WRITABLE)
def test_a_weight_survives_the_way_through_a_file(tmp_path: Path, type_name: str) -> None:
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    blocks = gguf.quantize(weight, type=type_name)["weight"]
    source = Source(f"GGUF_{type_name}", (48, 96), lambda: blocks)
    gguf_file.write(tmp_path / "m.gguf", {"layers.0.w.weight": source, "layers.0.w.bias": torch.zeros(48)})

    checkpoint = Checkpoint.open(tmp_path / "m.gguf")
    layer = layers_of(checkpoint, checkpoint.tensors)["layers.0.w"]

    assert format_of(layer) is gguf
    assert gguf.shape(layer) == (48, 96)
    assert gguf.describe(layer) == {"format": f"GGUF {type_name}"}
    back = gguf.read(layer).dequantize(torch.float32)
    assert float((back - weight).norm() / weight.norm()) < ERRORS[type_name]
    assert torch.equal(back, torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[type_name])))


@pytest.mark.parametrize("type_name", ["Q4_K", "Q3_K", "IQ4_XS"])
def test_types_that_cannot_be_written_are_read_all_the_same(tmp_path: Path, type_name: str) -> None:
    blocks = torch.from_numpy(random_blocks(type_name, 8, 512))

    weight = gguf.read(layer_in(tmp_path / "m.gguf", blocks, type_name))

    assert weight.shape == (8, 512)
    theirs = dequantize(blocks.numpy(), GGMLQuantizationType[type_name])
    assert torch.equal(weight.dequantize(torch.float32), torch.from_numpy(theirs))


def test_a_scale_that_is_no_number_is_named(tmp_path: Path) -> None:
    blocks = torch.from_numpy(random_blocks("Q4_K", 8, 512))
    blocks[5, 144 + 2 : 144 + 4] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)  # f16 NaN as a minimum

    with pytest.raises(CheckpointError, match=r"layers\.0\.w: a scale of its GGUF Q4_K blocks is infinite or not"):
        read_checked(gguf, layer_in(tmp_path / "m.gguf", blocks, "Q4_K"))


def test_scales_that_were_lost_are_named_and_a_weight_of_zeros_is_not(tmp_path: Path) -> None:
    blocks = gguf.quantize(torch.randn(8, 64), type="Q8_0")["weight"].view(-1, 34)
    blocks[:, :2] = 0
    zeros = gguf.quantize(torch.zeros(8, 64), type="Q4_0")["weight"]

    with pytest.raises(CheckpointError, match="every scale of its GGUF Q8_0 blocks is zero"):
        read_checked(gguf, layer_in(tmp_path / "lost.gguf", blocks.view(8, -1), "Q8_0"))
    assert not read_checked(gguf, layer_in(tmp_path / "zero.gguf", zeros, "Q4_0")).dequantize(torch.float32).any()


def test_a_type_without_decoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="GGUF Q8_1 is a type that nothing here unpacks"):
        read_checked(gguf, layer_in(tmp_path / "m.gguf", torch.zeros(4, 40, dtype=torch.uint8), "Q8_1"))


@pytest.mark.parametrize(
    ("weight", "type_name", "says"),
    [
        pytest.param(torch.ones(4, 33), "Q8_0", "multiple of 32 columns", id="odd columns"),
        pytest.param(torch.ones(64), "Q8_0", "multiple of 32 columns", id="no matrix"),
        pytest.param(torch.ones(4, 256), "Q4_K", "cannot be written", id="K type"),
        pytest.param(torch.full((4, 32), 1e6), "Q4_1", "not finite, or beyond", id="too large for f16"),
        pytest.param(torch.full((4, 32), torch.nan), "Q8_0", "not finite, or beyond", id="NaN"),
    ],
)
def test_what_cannot_be_packed_is_refused(weight: torch.Tensor, type_name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        gguf.quantize(weight, type=type_name)

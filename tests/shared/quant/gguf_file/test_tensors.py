"""Tensors of GGUF files as they are loaded."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from shared.quant.checkpoint import Checkpoint
from tests.support.gguf_blocks import random_blocks
from tests.support.gguf_packages import package_file


def test_tensors_are_mapped_and_writing_to_one_leaves_the_file_alone(typical: Path) -> None:
    before = typical.read_bytes()

    loaded = Checkpoint.open(typical).load(["plain"])["plain"]
    loaded.zero_()

    assert typical.read_bytes() == before
    again = Checkpoint.open(typical).load(["plain"])["plain"]
    assert again.any()
    offset = Checkpoint.open(typical).tensors["plain"].offset
    assert again.data_ptr() % mmap.PAGESIZE == offset % mmap.PAGESIZE, "it lies in memory as in the file"


def test_what_is_no_matrix_is_unpacked_when_loaded(tmp_path: Path) -> None:
    blocks = random_blocks("Q5_0", 1, 384)
    path = package_file(tmp_path / "m.gguf", {"norm.weight": (blocks[0], "Q5_0"), "x_pad_token": (blocks, "Q5_0")})
    expected = torch.from_numpy(dequantize(blocks, GGMLQuantizationType.Q5_0))

    checkpoint = Checkpoint.open(path)
    loaded = checkpoint.load()

    assert {(t.dtype, t.stored) for t in checkpoint.tensors.values()} == {("F32", "Q5_0")}
    assert torch.equal(loaded["norm.weight"], expected[0])
    assert torch.equal(loaded["x_pad_token"], expected)

"""A file with the types that come most often."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from tests.support.gguf_blocks import random_blocks
from tests.support.gguf_packages import Tensors, package_file


@pytest.fixture
def typical(tmp_path: Path) -> Path:
    numbers = numpy.random.default_rng(0).normal(size=(6, 64)).astype(numpy.float32)
    tensors: Tensors = {
        "a.weight": (quantize(numbers, GGMLQuantizationType.Q8_0), "Q8_0"),
        "b.weight": (random_blocks("Q4_K", 4, 512), "Q4_K"),
        "plain": (numbers, "F32"),
        "half": (numbers.astype(numpy.float16), "F16"),
        "brain": (quantize(numbers, GGMLQuantizationType.BF16), "BF16"),
    }
    return package_file(tmp_path / "typical.gguf", tensors, {"note": "hello", "words": ["a", "bc"] * 40, "n": [3, 4]})

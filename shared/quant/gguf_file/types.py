"""The types of numbers in GGUF files: their names, how many stand in a block, and its bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MAGIC = b"GGUF"
PREFIX = "GGUF_"  # of TensorInfo.dtype for packed types: "GGUF_Q4_K"

# Number in the file -> name, numbers per block, bytes per block.
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 28: ("F64", 1, 8), 30: ("BF16", 1, 2),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
BLOCKS: Mapping[str, tuple[int, int]] = {name: (numbers, size) for name, numbers, size in TYPES.values()}

MAX_DIMENSIONS = 4  # ggml's own
ALIGNMENT = 32  # of tensors in the files written here


def packed_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a GGUF file; dtype as a Source has it."""
    numbers, size = BLOCKS[dtype.removeprefix(PREFIX)]
    return math.prod(shape) // numbers * size


def torch_types() -> dict[str, Any]:
    """Of plain numbers, by their name in a file."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    }  # fmt: skip

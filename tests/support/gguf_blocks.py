"""GGUF bytes that are valid but were never anybody's weights, for types that no Python package packs."""

from __future__ import annotations

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

# Bytes of a block at which its f16 scales (and minima) begin: ggml/src/ggml-common.h.
F16_PLACES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,),
    "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip


def random_blocks(type_name: str, rows: int, columns: int, seed: int = 0, scale: float = 1e-3) -> numpy.ndarray:
    """uint8 (rows, bytes per row): any bits at all, but for scales near `scale`, of both signs."""
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    generator = numpy.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * columns // numbers, size), dtype=numpy.uint8)
    for place in F16_PLACES[type_name]:
        scales = generator.normal(0, scale, (len(blocks), 1)).astype(numpy.float16)
        blocks[:, place : place + 2] = scales.view(numpy.uint8)
    return blocks.reshape(rows, -1)

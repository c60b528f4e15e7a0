"""What the simulation of streaming has to know of this network: bytes of its blocks, and how long they compute.

Bits per weight are those of the packings; the computing times are the floors worked out for an H200 (790 TFLOP/s in
bf16 and 1300 in 8 bits for products, 600 for attention) and a card of the RTX 4090's class (150 and 280), at 1024x1024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from models.z_image.config import TransformerConfig

_GPUS_MS = {"bf16": {"H200": 75.0, "4090 class": 380.0}, "8-bit": {"H200": 51.0, "4090 class": 210.0}}
# Bits for a weight with its scales: a float32 for a row of some thousands is next to nothing.
_KINDS = {
    "bf16": (16.0, 0, "bf16"),
    "int8": (8.0, 0, "8-bit"),
    "nvfp4": (4.5, 0, "8-bit"),
    "int4 r128": (4.25, 128, "8-bit"),
}


def variants() -> Mapping[str, tuple[Sequence[int], Mapping[str, float]]]:
    """Kind of weight -> (bytes of each block, GPU -> milliseconds of all of them)."""
    config = TransformerConfig()
    dim, ffn = config.dim, config.ffn_dim
    shapes = ((3 * dim, dim), (dim, dim), (2 * ffn, dim), (dim, ffn))
    count = config.n_layers + 2 * config.n_refiner_layers
    found = {}
    for kind, (bits, rank, speed) in _KINDS.items():
        block = sum(rows * columns * bits / 8 + 2 * rank * (rows + columns) for rows, columns in shapes)
        found[kind] = ([round(block)] * count, _GPUS_MS[speed])
    return found

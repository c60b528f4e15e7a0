"""Files of small modules, by their tensors' shapes, and what they are estimated to take."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import fields
from pathlib import Path

from shared.app.memory import MemoryEstimate, Workload, estimate_memory
from tests.support.fake_family import write_weights


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A real safetensors file of bfloat16 zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


def block(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.attention.qkv.weight": (3 * width, width),
        f"{prefix}.attention.out.weight": (width, width),
        f"{prefix}.feed_forward.w1.weight": (hidden, width),
        f"{prefix}.feed_forward.w2.weight": (width, hidden),
        f"{prefix}.adaLN_modulation.0.weight": (4 * width, 16),
    }


def estimate(folder: Path, **changes: object) -> MemoryEstimate:
    """A transformer of two blocks 32 wide, a text encoder of 32 x 32, a VAE whose last stage takes 12 channels."""
    transformer = block("layers.0", 32, 80) | block("layers.1", 32, 80) | {"x_embedder.weight": (32, 64)}
    transformer |= {"t_embedder.mlp.0.weight": (8, 8), "t_embedder.mlp.2.weight": (8, 8)}
    files = {
        "transformer": [write_tensors(folder / "t.safetensors", transformer)],
        "text_encoder": write_weights(folder / "e.safetensors", shape=(32, 32)),
        "vae": write_weights(folder / "v.safetensors", "decoder.conv_out.weight", (3, 12, 3, 3)),
    }
    run = {"width": 256, "height": 128, "tile_cells": 0, "compute_bytes": 2, "vae_bytes": 4, "guided": False}
    return estimate_with(**files | run | changes)


def estimate_with(**values: object) -> MemoryEstimate:
    """estimate_memory() with the fields of its workload among the keywords."""
    work = {field.name: values.pop(field.name) for field in fields(Workload) if field.name in values}
    return estimate_memory(work=Workload(**work), **values)  # type: ignore[arg-type]

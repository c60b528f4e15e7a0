"""Files that convert_to_quant wrote (see convert_to_quant/README.md) are read as the numbers they were made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.quant.checkpoint import Checkpoint
from shared.quant.formats import format_of, layers_of
from tests.support.tiny_model import relative_error

FILES = Path(__file__).parent / "convert_to_quant"


def source() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layers.0.attention.out": (torch.randn(64, 64, generator=generator) * 0.05).bfloat16(),
        "layers.0.attention.qkv": (torch.randn(192, 64, generator=generator) * 0.05).bfloat16(),
    }


@pytest.mark.parametrize(
    ("name", "said", "largest_error"),
    [  # of normal numbers: e4m3 rounds by 0.026 on average, e2m1 with a scale for 16 by 0.095
        ("fp8", {"format": "FP8 scaled e4m3fn"}, 0.028),
        ("fp8_row", {"format": "FP8 scaled e4m3fn"}, 0.026),
        ("mxfp8", {"format": "mxfp8", "group": 32}, 0.027),
        ("nvfp4", {"format": "nvfp4", "group": 16, "spelling": "ComfyUI"}, 0.097),
    ],
)
@pytest.mark.parametrize("told_by", ["tensors", "header"])
def test_every_layer_is_the_matrix_it_was_made_from(
    name: str, said: dict[str, object], largest_error: float, told_by: str
) -> None:
    checkpoint = Checkpoint.open(FILES / f"{name}.safetensors")
    names = [n for n in checkpoint.tensors if told_by == "tensors" or not n.endswith(".comfy_quant")]

    layers = layers_of(checkpoint, names)

    assert layers.keys() == source().keys() | {"layers.0.ffn_norm1"}
    for module, weight in source().items():
        packed_format = format_of(layers[module])
        assert packed_format is not None
        assert packed_format.describe(layers[module]) == said
        packed = packed_format.read(layers[module])
        assert relative_error(packed.dequantize(torch.float32), weight.float()) <= largest_error

"""The shipped recipes name layers of the 6B model, and give the files they promise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import models.z_image
from models.z_image.config import TransformerConfig
from models.z_image.transformer import ZImageTransformer
from shared.quant.recipe import Recipe
from shared.quant.swizzle import padded_shape

FORMATS = ("nvfp4", "mxfp8", "bf16")
FEED_FORWARD = tuple(f"feed_forward.w{i}" for i in (1, 2, 3))
MIXED = Path(models.z_image.__file__).parent / "recipes" / "nvfp4_mixed.json"


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the 6B model by its official name."""
    with torch.device("meta"):
        model = ZImageTransformer(TransformerConfig())
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if ".w13." in name:
            half = (tensor.shape[0] // 2, tensor.shape[1])
            found |= {name.replace("w13", "w1"): half, name.replace("w13", "w3"): half}
        else:
            found[name] = tuple(tensor.shape)
    return found


@pytest.fixture(scope="module")
def mixed() -> Recipe:
    return Recipe.load(MIXED, FORMATS)


def nbytes(shape: tuple[int, ...], number_format: str) -> int:
    numbers = torch.Size(shape).numel()
    if number_format == "bf16":
        return numbers * 2
    block, code_bytes, extra = {"nvfp4": (16, numbers // 2, 4), "mxfp8": (32, numbers, 0)}[number_format]
    scale_rows, scale_columns = padded_shape(shape[0], shape[1] // block)
    return code_bytes + scale_rows * scale_columns + extra


def test_the_mixed_recipe_reaches_the_published_size(mixed: Recipe, shapes: dict[str, tuple[int, ...]]) -> None:
    chosen = {n: mixed.format_of(n.removesuffix(".weight")) if n.endswith(".weight") else "bf16" for n in shapes}

    assert len(shapes) == 453
    assert Counter(chosen.values()) == {"nvfp4": 120, "mxfp8": 66, "bf16": 267}
    total = sum(nbytes(shape, chosen[n]) for n, shape in shapes.items())
    assert f"{total / 1e9:.2f}" == "4.84"


def test_the_mixed_recipe_is_the_published_layer_map(mixed: Recipe, shapes: dict[str, tuple[int, ...]]) -> None:
    """The card's tables, but for context_refiner.1.feed_forward.w2, which its command puts under MXFP8."""
    linears = [n.removesuffix(".weight") for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2]
    blocks = [n for n in linears if n.startswith(("layers.", "noise_refiner.", "context_refiner."))]

    chosen = {which: {n for n in blocks if mixed.format_of(n) == which} for which in FORMATS}

    assert chosen["mxfp8"] == {
        *(f"layers.{i}.attention.out" for i in (0, 1, 3, 6, 9, 11, 12, 13, 14, 19, 20, 26, 27, 28, 29)),
        *(f"layers.{i}.attention.qkv" for i in (10, 16, 26, 27, 28)),
        *(f"layers.{i}.feed_forward.w1" for i in range(3, 30)),
        *(f"layers.{i}.adaLN_modulation.0" for i in range(16, 22)),
        *(f"context_refiner.{i}.{n}" for i in (0, 1) for n in ("attention.qkv", *FEED_FORWARD)),
        *(f"noise_refiner.0.{n}" for n in ("attention.qkv", "attention.out", *FEED_FORWARD[:2])),
        "noise_refiner.1.feed_forward.w1",
    }
    assert chosen["bf16"] == {
        "layers.29.attention.qkv",
        *(f"layers.{i}.adaLN_modulation.0" for i in range(22, 30)),
        *(f"context_refiner.{i}.attention.out" for i in (0, 1)),
        *(f"noise_refiner.1.{n}" for n in ("attention.qkv", "attention.out", "feed_forward.w2")),
        *(f"noise_refiner.{i}.feed_forward.w3" for i in (0, 1)),
    }
    assert {mixed.format_of(n) for n in set(linears) - set(blocks)} == {"bf16"}, "embedders and the final layer"


def test_every_rule_names_a_layer_that_no_earlier_one_took(mixed: Recipe, shapes: dict[str, tuple[int, ...]]) -> None:
    modules = [n.removesuffix(".weight") for n in shapes]
    first = Counter(next((r.pattern.pattern for r in mixed.rules if r.pattern.fullmatch(m)), None) for m in modules)

    assert [r.pattern.pattern for r in mixed.rules if not first[r.pattern.pattern]] == []

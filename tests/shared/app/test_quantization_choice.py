"""Which of a preset's alternative files is taken: by the flags, by Wan2GP's keys of the configuration, or the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.app.context import AppContext
from shared.app.plan import wanted_files
from shared.quant.errors import UserError
from tests.support.fake_family import FakeHandler, fake_context, write_preset

TRANSFORMERS = ["model_bf16.safetensors", "model_quanto_bf16_int8.safetensors"]
ENCODERS = ["qwen3_bf16.safetensors", "qwen3_quanto_bf16_int8.safetensors"]


def context(root: Path, config: dict[str, str] | None = None, **flags: Any) -> AppContext:
    write_preset(root, "several", URLs=TRANSFORMERS, text_encoder_URLs=ENCODERS)
    (root / "wgp_config.json").write_text(json.dumps(config or {}))
    return fake_context(root, FakeHandler(), **flags)


def chosen(ctx: AppContext) -> tuple[str, str]:
    files = wanted_files(ctx, ctx.presets.get("several"))
    return files.transformer, files.text_encoder


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ({}, {}, (0, 0)),
        ({}, {"transformer_quantization": "int8"}, (1, 1)),
        ({}, {"transformer_quantization": "int8", "text_encoder_quantization": "bf16"}, (1, 0)),
        ({}, {"text_encoder_quantization": "INT8"}, (0, 1)),
        ({}, {"transformer_quantization": "fp8"}, (1, 1)),
        ({"transformer_quantization": "int8", "text_encoder_quantization": "bf16"}, {}, (1, 0)),
        ({"transformer_quantization": "int8"}, {"transformer_quantization": "bf16"}, (0, 0)),
    ],
    ids=str,
)  # fmt: skip
def test_the_flag_wins_over_the_configuration(
    tmp_path: Path, config: dict[str, str], flags: dict[str, str], expected: tuple[int, int]
) -> None:
    ctx = context(tmp_path, config, **flags)

    assert chosen(ctx) == (TRANSFORMERS[expected[0]], ENCODERS[expected[1]])


def test_a_kind_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path) -> None:
    ctx = context(tmp_path, text_encoder_quantization="int9")

    with pytest.raises(UserError, match=r"--text-encoder-quantization int9.*bf16, int8, fp8"):
        chosen(ctx)

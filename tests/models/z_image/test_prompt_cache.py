"""Prompts that are remembered on the disk: the text encoder is loaded when one is not, once, and never otherwise."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import models
from models.z_image import z_image_main
from shared.app.context import AppContext
from shared.app.events import Event, Status, StepDone
from shared.app.families import load_families
from shared.app.settings import GenerationSettings
from shared.quant.errors import UserError
from tests.support.tiny_preset import TINY_PRESET

PRESET = {"model": TINY_PRESET, "resolution": "32x48", "num_inference_steps": 2}


@pytest.fixture
def root(tmp_path: Path, model_folder: Path) -> Path:
    shutil.copytree(model_folder, tmp_path / "tiny")
    (tmp_path / "defaults").mkdir()
    (tmp_path / "defaults" / "tiny.json").write_text(json.dumps(PRESET))
    return tmp_path


@pytest.fixture
def encoder_loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that text encoders were loaded from, so far."""
    loads: list[Path] = []
    load = z_image_main.load_text_encoder

    def counted(path: Path, dtype: torch.dtype, *, keep_mapped: bool) -> torch.nn.Module:
        loads.append(path)
        return load(path, dtype, keep_mapped=keep_mapped)

    monkeypatch.setattr(z_image_main, "load_text_encoder", counted)
    return loads


def new_run(root: Path, **flags: object) -> AppContext:
    """The program as if started anew: nothing in memory."""
    args = argparse.Namespace(gpu="cpu", **flags)
    return AppContext.create(args, root, load_families(Path(models.__path__[0])))


def draw(ctx: AppContext, prompt: str, events: list[Event] | None = None, **settings: object) -> np.ndarray:
    order = GenerationSettings.build(ctx.presets.get("tiny"), {}, {"prompt": prompt, "seed": 3, **settings})
    on_event = None if events is None else events.append
    result = ctx.session.generate("tiny", order, on_event=on_event)
    return np.stack([np.asarray(Image.open(image.path)) for image in result.images])


def test_a_remembered_prompt_is_drawn_without_a_text_encoder_and_looks_the_same(
    root: Path, encoder_loads: list[Path]
) -> None:
    first = draw(new_run(root), "a red fox")
    events: list[Event] = []

    again = draw(new_run(root), "a red fox", events)

    assert len(encoder_loads) == 1
    assert np.array_equal(first, again)
    assert Status("The text encoder was not loaded: every prompt is remembered") in events


def test_a_new_prompt_in_the_same_run_fetches_the_encoder_after_all(root: Path, encoder_loads: list[Path]) -> None:
    expected = draw(new_run(root, prompt_cache=0), "an owl")
    draw(new_run(root), "a red fox")
    encoder_loads.clear()
    ctx = new_run(root)
    draw(ctx, "a red fox")
    before = len(encoder_loads)

    owl = draw(ctx, "an owl")

    assert (before, len(encoder_loads)) == (0, 1)
    assert np.array_equal(owl, expected)


def test_all_prompts_are_encoded_before_the_first_step(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[object] = []
    ctx = new_run(root)
    settings = GenerationSettings.build(
        ctx.presets.get("tiny"), {}, {"prompt": "fox\nowl\nfox", "multi_prompts_gen_type": "G", "seed": 3}
    )
    ctx.session.generate(
        "tiny", settings, on_event=lambda event: order.append(event) if isinstance(event, StepDone) else None
    )
    model = ctx.session._model._model
    assert model is not None
    encoder = model.processor.pipeline.text_encoder
    encoded = encoder.encoded

    ctx.session.generate("tiny", settings)

    assert len(order) == 3 * 2
    assert encoded == 2  # fox and owl, once each
    assert encoder.encoded == 2


def test_a_prompt_that_is_refused_stops_the_whole_queue_before_it_draws(root: Path) -> None:
    ctx = new_run(root)
    events: list[Event] = []
    settings = GenerationSettings.build(
        ctx.presets.get("tiny"),
        {},
        {"prompt": "fox\n" + "x" * 600, "multi_prompts_gen_type": "G", "long_prompt": "refuse"},
    )

    with pytest.raises(UserError, match="at most 512"):
        ctx.session.generate("tiny", settings, on_event=events.append)

    assert not any(isinstance(event, StepDone) for event in events)


def test_what_is_cut_is_told_also_for_a_prompt_that_was_encoded_ahead(root: Path) -> None:
    events: list[Event] = []

    draw(new_run(root), "x" * 600, events, long_prompt="cut")
    remembered: list[Event] = []
    draw(new_run(root), "x" * 600, remembered, long_prompt="cut")

    for heard in (events, remembered):
        assert any(isinstance(event, Status) and "was cut to 512" in event.text for event in heard)


def test_with_the_cache_off_nothing_is_kept(root: Path, encoder_loads: list[Path]) -> None:
    for _ in range(2):
        draw(new_run(root, prompt_cache=0), "a red fox")

    assert len(encoder_loads) == 2
    assert not (root / ".cache" / "prompts").exists()


def test_the_negative_prompt_is_remembered_too(root: Path, encoder_loads: list[Path]) -> None:
    guided = {"guidance_scale": 4.0, "negative_prompt": "blue"}
    first = draw(new_run(root), "a red fox", **guided)

    again = draw(new_run(root), "a red fox", **guided)

    assert len(encoder_loads) == 1
    assert np.array_equal(first, again)


def test_another_encoder_has_other_prompts(root: Path, encoder_loads: list[Path]) -> None:
    draw(new_run(root), "a red fox")
    path = root / "tiny" / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")  # the last weight is another

    draw(new_run(root), "a red fox")

    assert len(encoder_loads) == 2


def test_a_lora_on_the_encoder_has_its_own_prompts(root: Path, encoder_loads: list[Path]) -> None:
    torch.manual_seed(0)
    base = "text_encoder.model.layers.0.self_attn.q_proj"
    weights = {f"{base}.lora_A.weight": torch.randn(2, 64), f"{base}.lora_B.weight": torch.randn(64, 2)}
    save_file(weights, root / "style.safetensors")
    plain = draw(new_run(root), "a red fox")
    encoder_loads.clear()
    styled = {"activated_loras": [str(root / "style.safetensors")]}

    first = draw(new_run(root), "a red fox", **styled)
    weaker = draw(new_run(root), "a red fox", **styled, loras_multipliers="0.5")
    again = draw(new_run(root), "a red fox", **styled)
    plain_again = draw(new_run(root), "a red fox")

    assert not np.array_equal(plain, first)
    assert not np.array_equal(first, weaker)
    assert np.array_equal(first, again)
    assert np.array_equal(plain, plain_again)
    assert len(encoder_loads) == 3  # for the LoRA's sake, and not for the plain one

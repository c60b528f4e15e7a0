"""Presets that share a text encoder or a VAE: what is in memory is not loaded again, and nothing else is kept."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from shared.app.context import AppContext
from shared.app.events import Status
from shared.app.plan import Choice, find_machine
from tests.support.fake_family import FakeHandler, write_preset, write_weights
from tests.support.orders import order

EVERYTHING = ["text_encoder", "transformer", "vae"]


def test_a_switch_of_presets_loads_only_the_parts_that_differ(ctx: AppContext, handler: FakeHandler) -> None:
    write_preset(ctx.root, "same_vae", VAE_URLs=["file:weights/one/vae.safetensors"])
    same = {f"{key}_URLs": [f"file:weights/one/{key.lower()}.safetensors"] for key in ("text_encoder", "VAE")}
    write_preset(ctx.root, "finetune", **same)
    ctx.refresh_presets()

    for preset in ("one", "two", "one", "finetune", "same_vae"):
        ctx.session.generate(preset, order(ctx, preset))

    assert handler.built == [EVERYTHING, EVERYTHING, EVERYTHING, ["transformer"], ["text_encoder", "transformer"]]
    assert handler.processors[3].vae is handler.processors[4].vae


def test_what_is_kept_is_said(ctx: AppContext) -> None:
    write_preset(ctx.root, "finetune", VAE_URLs=["file:weights/one/vae.safetensors"])
    ctx.refresh_presets()
    ctx.session.generate("one", order(ctx))

    events = list(ctx.session.stream("finetune", order(ctx, "finetune")))

    assert "Loading Name of finetune; kept in memory: the VAE" in [e.text for e in events if isinstance(e, Status)]


def test_a_part_in_another_number_type_is_loaded_anew(
    ctx: AppContext, handler: FakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx.session.generate("one", order(ctx))
    usual = find_machine(ctx.presets.get("one"), "cpu")
    other = "bfloat16" if usual.dtype.value == "float32" else "float32"
    monkeypatch.setattr("shared.app.run.find_machine", lambda *_: replace(usual, dtype=Choice(other, "a test")))

    ctx.session.generate("one", order(ctx))

    assert handler.built == [EVERYTHING, EVERYTHING]


def test_a_file_that_was_replaced_is_loaded_and_the_rest_kept(ctx: AppContext, handler: FakeHandler) -> None:
    ctx.session.generate("one", order(ctx))
    path = write_weights(ctx.root / "weights" / "one" / "vae.safetensors", "another")
    os.utime(path, (1, 1))

    ctx.session.generate("one", order(ctx))

    assert handler.built == [EVERYTHING, ["vae"]]


def test_kept_parts_have_no_loras_on_them_any_more(ctx: AppContext, handler: FakeHandler) -> None:
    write_weights(ctx.root / "lora_root" / "fake" / "style.safetensors")
    write_preset(ctx.root, "again", URLs=["file:weights/one/transformer.safetensors"])
    ctx.refresh_presets()
    ctx.session.generate("one", order(ctx, activated_loras=["style.safetensors"]))

    ctx.session.generate("again", order(ctx, "again"))

    assert handler.built[1] == ["text_encoder", "vae"]
    assert handler.processors[0].loras == []

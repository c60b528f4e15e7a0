"""One model in memory: how it is loaded, when it is replaced, and its LoRAs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.app.context import AppContext
from shared.app.events import Event, Status
from shared.quant.errors import UserError
from tests.support.fake_family import FakeHandler, write_preset, write_weights
from tests.support.orders import order


def test_load_model_is_called_as_a_wan2gp_host_calls_it(ctx: AppContext, handler: FakeHandler) -> None:
    ctx.session.generate("one", order(ctx))

    (files, model_type, base_model_type, model_def), keywords = handler.loads[0]
    assert [Path(file).name for file in files] == ["transformer.safetensors"]
    assert (model_type, base_model_type, model_def["name"]) == ("one", "fake", "Name of one")
    assert Path(keywords["text_encoder_filename"]).name == "text_encoder.safetensors"
    assert Path(keywords["vae_filename"]).name == "vae.safetensors"
    assert isinstance(keywords["dtype"], torch.dtype) and keywords["VAE_dtype"] == torch.float32
    assert keywords["profile"] == -1
    assert "tokenizer_folder" in keywords


def test_modules_follow_the_transformer_in_the_list(ctx: AppContext, handler: FakeHandler) -> None:
    write_weights(ctx.root / "ckpts" / "control.safetensors")
    write_preset(ctx.root, "with_module", modules=[["control.safetensors"]])
    ctx.refresh_presets()

    image = ctx.session.generate("with_module", order(ctx, "with_module")).images[0]

    assert [Path(file).name for file in handler.loads[0][0][0]] == ["transformer.safetensors", "control.safetensors"]
    assert image.record["modules"] == ["control.safetensors"]


def test_the_model_stays_loaded_for_the_next_call(ctx: AppContext, handler: FakeHandler) -> None:
    ctx.session.generate("one", order(ctx))
    ctx.session.generate("one", order(ctx, seed=1))

    assert len(handler.loads) == 1


def test_another_preset_replaces_the_model(ctx: AppContext, handler: FakeHandler) -> None:
    for preset in ("one", "two", "one"):
        ctx.session.generate(preset, order(ctx, preset))

    assert [arguments[1] for arguments, _ in handler.loads] == ["one", "two", "one"]


def test_release_lets_go_of_the_model(ctx: AppContext, handler: FakeHandler) -> None:
    ctx.session.generate("one", order(ctx))
    ctx.session.release()
    ctx.session.generate("one", order(ctx))

    assert len(handler.loads) == 2


def test_a_configuration_of_the_preset_is_what_gets_loaded(ctx: AppContext, handler: FakeHandler) -> None:
    write_weights(ctx.root / "ckpts" / "other_vae.safetensors")
    write_preset(ctx.root, "sets", configs={"sharp": {"VAE_URLs": ["other_vae.safetensors"]}})
    ctx.refresh_presets()

    ctx.session.generate("sets", order(ctx, "sets", config=",,,sharp"))

    assert Path(handler.loads[0][1]["vae_filename"]).name == "other_vae.safetensors"


def test_loras_are_found_as_given_and_in_the_lora_folder(ctx: AppContext, handler: FakeHandler) -> None:
    elsewhere = write_weights(ctx.root / "elsewhere" / "a.safetensors")
    write_weights(ctx.root / "lora_root" / "fake" / "style" / "b.safetensors")
    wanted = {"activated_loras": [str(elsewhere), "style/b.safetensors"], "loras_multipliers": "0.5 -1"}

    result = ctx.session.generate("one", order(ctx, **wanted))

    assert handler.processors[0].loras == [("a.safetensors", 0.5), ("b.safetensors", -1.0)]
    assert {"a.safetensors", "b.safetensors"} <= {Path(file["path"]).name for file in result.files}


def test_the_presets_own_loras_come_before_the_users(ctx: AppContext, handler: FakeHandler) -> None:
    for name in ("own", "users"):
        write_weights(ctx.root / "lora_root" / "fake" / f"{name}.safetensors")
    write_preset(ctx.root, "with_lora", loras=["own.safetensors"], loras_multipliers=[0.25])
    ctx.refresh_presets()

    image = ctx.session.generate("with_lora", order(ctx, "with_lora", activated_loras=["users.safetensors"])).images[0]

    assert handler.processors[0].loras == [("own.safetensors", 0.25), ("users.safetensors", 1.0)]
    assert image.record["activated_loras"] == ["users.safetensors"]


def test_loras_are_changed_only_when_they_differ_and_taken_off_at_the_end(
    ctx: AppContext, handler: FakeHandler
) -> None:
    write_weights(ctx.root / "lora_root" / "fake" / "a.safetensors")
    for loras in (["a.safetensors"], ["a.safetensors"], []):
        ctx.session.generate("one", order(ctx, activated_loras=loras))

    assert handler.processors[0].lora_loads == 2
    assert handler.processors[0].loras == []


def test_a_lora_that_is_nowhere_is_an_error_before_loading(ctx: AppContext, handler: FakeHandler) -> None:
    write_weights(ctx.root / "lora_root" / "fake" / "watercolour.safetensors")

    with pytest.raises(UserError, match="watercolor") as caught:
        ctx.session.generate("one", order(ctx, activated_loras=["watercolor.safetensors"]))

    assert "watercolour.safetensors" in caught.value.hint
    assert handler.loads == []


def test_strengths_reach_the_model_as_numbers_by_phase(ctx: AppContext, handler: FakeHandler) -> None:
    write_weights(ctx.root / "lora_root" / "fake" / "a.safetensors")

    ctx.session.generate("one", order(ctx, activated_loras=["a.safetensors"], loras_multipliers="0.2,1;0"))

    assert handler.processors[0].loras == [("a.safetensors", ((0.2, 1.0), (0.0,)))]


def test_what_of_a_lora_matched_is_said_returned_and_recorded(ctx: AppContext, handler: FakeHandler) -> None:
    path = write_weights(ctx.root / "lora_root" / "fake" / "a.safetensors")
    handler.prepare = lambda processor: setattr(processor, "unmatched", ("stranger.alpha",))
    events: list[Event] = []

    result = ctx.session.generate("one", order(ctx, activated_loras=["a.safetensors"]), on_event=events.append)

    assert Status("a.safetensors: 2 of 3 keys matched; not stranger.alpha") in events
    found = {"matched": 2, "total": 3, "unmatched": ["stranger.alpha"]}
    assert result.as_dict()["loras"] == [{"file": str(path), **found}]
    assert result.images[0].record["provenance"]["loras"] == [{"file": "a.safetensors", **found}]

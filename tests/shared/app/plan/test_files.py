"""A plan names every file with its place, those of LoRAs and of error-correction LoRAs among them."""

from __future__ import annotations

from pathlib import Path

from shared.app.context import AppContext
from tests.support.fake_family import FakeHandler, fake_context, write_weights
from tests.support.fake_plans import REMOTE, plan


def test_every_file_has_its_role_place_and_size(ctx: AppContext) -> None:
    files = {file.role: file for file in plan(ctx).files}

    assert list(files) == ["transformer", "text_encoder", "vae"]
    for role, file in files.items():
        assert file.path == ctx.root / "weights" / "one" / f"{role}.safetensors"
        assert file.bytes == file.path.stat().st_size


def test_a_programs_own_file_that_is_gone_is_missing_and_not_to_download(ctx: AppContext) -> None:
    (ctx.root / "weights" / "one" / "vae.safetensors").unlink()

    made = plan(ctx)

    assert made.to_download == ()
    assert [file.role for file in made.missing] == ["vae"]


def test_a_further_root_is_searched(ctx: AppContext, tmp_path: Path) -> None:
    elsewhere = write_weights(tmp_path / "comfy" / "diffusion_models" / "remote.safetensors")

    again = fake_context(ctx.root, FakeHandler(), ckpts=[str(tmp_path / "comfy")])

    assert plan(again, "remote").paths("transformer") == (elsewhere,)


def test_loras_are_files_of_the_plan(ctx: AppContext) -> None:
    lora = write_weights(ctx.root / "lora_root" / "fake" / "a.safetensors")

    made = plan(ctx, activated_loras=["a.safetensors"], loras_multipliers="0.5")

    assert made.paths("lora") == (lora,)
    assert made.lora_strengths == (0.5,)


def test_the_error_correction_lora_beside_a_file_comes_with_it_at_the_strength_asked_for(ctx: AppContext) -> None:
    transformer = ctx.root / "weights" / "one" / "transformer.safetensors"
    beside = transformer.with_name("transformer_lora.safetensors")
    write_weights(beside, "diffusion_model.layers.0.attention.out.lora_up.weight")
    lora = write_weights(ctx.root / "lora_root" / "fake" / "a.safetensors")

    assert plan(ctx).paths("lora") == (beside,)
    assert plan(ctx).lora_strengths == (1.0,)
    both = plan(ctx, error_lora_strength=0.5, activated_loras=["a.safetensors"])
    assert (both.paths("lora"), both.lora_strengths) == ((beside, lora), (0.5, 1.0))
    assert plan(ctx, error_lora_strength=0).paths("lora") == ()
    assert both.settings.as_record()["error_lora_strength"] == 0.5


def test_another_lora_of_that_name_is_not_taken_for_one(ctx: AppContext) -> None:
    transformer = ctx.root / "weights" / "one" / "transformer.safetensors"
    write_weights(transformer.with_name("transformer_lora.safetensors"), "diffusion_model.layers.0.alpha")

    assert plan(ctx).paths("lora") == ()


def test_a_lora_address_that_was_downloaded_by_hand_is_found_in_the_lora_folder(ctx: AppContext) -> None:
    lora = write_weights(ctx.root / "lora_root" / "fake" / "remote.safetensors")

    assert plan(ctx, activated_loras=[REMOTE]).paths("lora") == (lora,)

"""Plans name every file and choice with its reason, and need neither torch nor a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.app.context import AppContext
from shared.app.device import DeviceInfo
from shared.app.memory_plan import Relief
from shared.app.plan import Choice, GenerationPlan, Machine, find_machine, find_machine_quickly, make_plan
from shared.app.settings import GenerationSettings
from shared.quant.errors import UserError
from tests.support.fake_family import FakeHandler, fake_context, write_preset, write_weights

PROGRAM = Path(__file__).parents[3]
GIB = 2**30
CARD = Machine(DeviceInfo("cuda", "Card", 89, 24 * GIB, "a test's card"), Choice("bfloat16", "native"))
CPU = Machine(DeviceInfo("cpu", "CPU", None, 16 * GIB, "asked for"), Choice("float32", "safe"))
REMOTE = "https://huggingface.co/owner/repo/resolve/main/remote.safetensors"


@pytest.fixture
def ctx(tmp_path: Path) -> AppContext:
    write_preset(tmp_path, "one")
    write_preset(tmp_path, "remote", URLs=[REMOTE])
    return fake_context(tmp_path, FakeHandler())


def plan(ctx: AppContext, preset: str = "one", machine: Machine = CPU, **overrides: Any) -> GenerationPlan:
    chosen = ctx.presets.get(preset)
    return make_plan(ctx, chosen, GenerationSettings.build(chosen, {}, {"prompt": "fox", **overrides}), machine)


def test_every_file_has_its_role_place_and_size(ctx: AppContext) -> None:
    files = {file.role: file for file in plan(ctx).files}

    assert list(files) == ["transformer", "text_encoder", "vae"]
    for role, file in files.items():
        assert file.path == ctx.root / "weights" / "one" / f"{role}.safetensors"
        assert file.bytes == file.path.stat().st_size


def test_a_file_that_is_elsewhere_is_to_be_downloaded(ctx: AppContext) -> None:
    made = plan(ctx, "remote")

    assert [file.url for file in made.to_download] == [REMOTE]
    assert made.memory is None  # a file's size counts, and the preset does not say it
    assert made.download is not None and made.download.words == "1 file of unknown size"


SHAPES = {"transformer": {"numbers": 10**9, "outside": 10**7, "blocks": 10, "width": 64, "hidden": 256}}


@pytest.fixture
def sized(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> AppContext:
    """The preset "remote" says what its transformer weighs, and the family knows the shapes of one."""
    monkeypatch.setattr(FakeHandler, "query_published_shapes", lambda self, architecture: SHAPES, raising=False)
    write_preset(ctx.root, "remote", URLs=[REMOTE], gigabytes={"transformer": 2.0})
    ctx.refresh_presets()
    return ctx


def test_a_file_whose_size_is_published_is_weighed_before_it_is_here(sized: AppContext) -> None:
    made = plan(sized, "remote")

    assert made.memory is not None and made.memory.published == ("transformer",)
    # Computed in float32: of 16-bit numbers those outside blocks are made so, the others where they are multiplied.
    numbers, outside = SHAPES["transformer"]["numbers"], SHAPES["transformer"]["outside"]
    weights = (2 * (numbers - outside) + 4 * outside) / 2**20
    assert made.memory.weights_mb["transformer"] == pytest.approx(weights)
    assert made.placement is not None and made.placement.ram_mb > weights
    assert made.memory_words.startswith("From the published sizes") and "published sizes" in made.offload.reason
    told = json.loads(json.dumps(made.as_dict()))
    assert told["memory"]["source"] == "published sizes"
    assert told["memory"]["from_published_sizes"] == ["transformer"]
    assert [file["published_bytes"] for file in told["files"]] == [2 * 10**9, None, None]


def test_the_estimate_is_of_the_file_itself_once_that_is_here(sized: AppContext) -> None:
    write_weights(sized.root / "ckpts" / "remote.safetensors")

    made = plan(fake_context(sized.root, FakeHandler()), "remote")

    assert made.memory is not None and made.memory.published == () and made.download is None
    assert made.as_dict()["memory"]["source"] == "file headers"
    assert not made.memory_words.startswith("From")


def test_a_size_without_the_familys_shapes_counts_for_the_download_alone(
    sized: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(FakeHandler, "query_published_shapes")

    made = plan(sized, "remote")

    assert made.memory is None and made.memory_words == "" and made.fits
    assert made.download is not None and made.download.words == "2.0 GB in 1 file"


def test_a_download_says_what_it_does_not_count(sized: AppContext) -> None:
    made = plan(sized, "remote", activated_loras=["https://example.org/lora.safetensors"])

    assert made.download is not None
    assert made.download.unknown == ("https://example.org/lora.safetensors",)
    assert made.download.words == "2.0 GB in 2 files, of them 1 of unknown size not counted"
    assert plan(sized, "one").download is None


def test_what_a_cut_download_brought_is_not_fetched_again(sized: AppContext) -> None:
    target = sized.files.target(REMOTE)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.0123456789ab.part")
    part.touch()
    os.truncate(part, 5 * 10**8)

    made = plan(sized, "remote")

    assert made.download is not None
    assert made.download.words == "1.5 GB in 1 file; 0.5 GB more are here already"
    told = made.as_dict()["download"]
    assert (told["bytes"], told["received"]) == (1_500_000_000, 500_000_000)


def test_a_disk_that_is_too_small_is_told_before_the_download(
    sized: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(sized.root)._replace(free=5 * 10**8)
    monkeypatch.setattr("shared.app.plan.shutil.disk_usage", lambda folder: usage)

    made = plan(sized, "remote")

    assert made.download is not None and made.download.is_too_large
    assert f"Only 0.5 GB are free at {sized.files.roots[0]}: 1.5 GB too few" in made.download.words
    assert made.as_dict()["download"]["fits"] is False


def test_a_machine_that_is_too_small_is_told_with_what_it_lacks(
    sized: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.app.plan.ram_bytes", lambda: 2 * GIB)
    small = plan(sized, "remote")
    monkeypatch.setattr("shared.app.plan.ram_bytes", lambda: 64 * GIB)
    large = plan(sized, "remote")

    assert not small.fits and "2,048 MiB of RAM, " in small.fit_words and "too few" in small.memory_words
    assert large.fits and large.fit_words == "This machine has 65,536 MiB of RAM: it fits."
    assert (small.as_dict()["memory"]["fits"], large.as_dict()["memory"]["fits"]) == (False, True)


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


def test_the_plan_is_json(ctx: AppContext) -> None:
    told = json.loads(json.dumps(plan(ctx, "remote", seed=5).as_dict()))

    assert told["preset"] == "remote"
    assert told["settings"]["seed"] == 5
    assert told["to_download"] == [REMOTE]
    assert [file["role"] for file in told["files"]] == ["transformer", "text_encoder", "vae"]
    for choice in ("device", "dtype", "attention", "offload"):
        assert told[choice]["value"] and told[choice]["reason"]


def test_on_the_cpu_weights_are_placed_directly(ctx: AppContext) -> None:
    made = plan(ctx)

    assert made.offload.value == "direct"
    assert made.placement is not None and made.placement.vram_mb == 0


def test_a_card_with_room_for_all_needs_no_profile(ctx: AppContext) -> None:
    made = plan(ctx, machine=CARD)

    assert made.offload.value == "direct"
    assert made.placement is not None and made.placement.vram_mb > 0


def test_the_profile_flag_decides_before_the_configuration(ctx: AppContext) -> None:
    ctx.config["profile"] = 5
    assert plan(ctx, machine=CARD).offload.value == "profile 5"

    ctx.args.profile = 3.5
    assert plan(ctx, machine=CARD).offload.value == "profile 3.5"

    ctx.args.profile = -1
    assert plan(ctx, machine=CARD).offload.value == "profile 5"


def test_the_offload_flag_and_the_cap_decide_before_the_configuration(ctx: AppContext) -> None:
    ctx.config |= {"offload": "mmgp", "max_vram": "8GB"}
    assert plan(ctx, machine=CARD).offload.value.startswith("profile")

    ctx.args.offload, ctx.args.max_vram = "stream", "2GB"
    made = plan(ctx, machine=CARD)
    assert made.offload.value == "stream"
    assert made.placement is not None and made.placement.cap == 2 * GIB
    assert json.loads(json.dumps(made.as_dict()))["memory"]["cap_mb"] == 2048


def test_what_was_tried_before_is_kept_to(ctx: AppContext) -> None:
    preset = ctx.presets.get("one")
    settings = GenerationSettings.build(preset, {}, {"prompt": "fox"})

    assert make_plan(ctx, preset, settings, CARD, Relief(engine="stream")).offload.value == "stream"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"offload": "disk"}, "disk"),
        ({"max_vram": "much"}, "much"),
        ({"profile": 7.0}, "7"),
        ({"attention": "sdap"}, "sdap"),
        ({"attention": "sage"}, "sage"),
    ],
)
def test_a_flag_that_cannot_be_followed_is_the_users_mistake(
    ctx: AppContext, flags: dict[str, Any], named: str
) -> None:
    for name, value in flags.items():
        setattr(ctx.args, name, value)

    with pytest.raises(UserError, match=named):
        plan(ctx)


def test_the_presets_attention_rule_is_followed_on_its_card(ctx: AppContext) -> None:
    write_preset(ctx.root, "ruled", attention={"<90": "sdpa"})
    ctx.refresh_presets()

    assert "preset" in plan(ctx, "ruled", machine=CARD).attention.reason
    assert "preset" not in plan(ctx, "ruled", machine=CPU).attention.reason


def test_a_number_type_the_preset_demands_is_for_gpus(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    write_preset(ctx.root, "half", dtype="fp16")
    preset = ctx.refresh_presets().get("half")
    monkeypatch.setattr("shared.app.plan.detect", lambda prefer: CARD.device)

    assert find_machine(preset).dtype.value == "float16"
    monkeypatch.undo()
    assert find_machine(preset, "cpu").dtype.value in ("float32", "bfloat16")


@pytest.mark.skipif(sys.platform != "linux", reason="the quick look reads Linux's own files")
def test_the_quick_look_at_the_machine_agrees_with_torch_and_does_without_it(ctx: AppContext) -> None:
    preset = ctx.presets.get("one")
    code = (
        "import sys; from types import SimpleNamespace; from shared.app.plan import find_machine_quickly\n"
        "machine = find_machine_quickly(SimpleNamespace(model_def={}), 'cpu')\n"
        "print(machine.device.kind, machine.dtype.value, 'torch' in sys.modules)"
    )

    quick = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM, capture_output=True, text=True, check=True)

    asked = find_machine(preset, "cpu")
    assert quick.stdout.split() == [asked.device.kind, asked.dtype.value, "False"]


def test_an_unknown_device_is_the_users_mistake(ctx: AppContext) -> None:
    with pytest.raises(UserError, match="tpu"):
        find_machine_quickly(ctx.presets.get("one"), "tpu")

"""Files are weighed by their headers, or by their published sizes before they are here."""

from __future__ import annotations

import json

import pytest

from shared.app.context import AppContext
from shared.app.memory_plan import Relief
from shared.app.plan import make_plan
from shared.app.settings import GenerationSettings
from tests.support.fake_family import FakeHandler, fake_context, write_weights
from tests.support.fake_plans import CARD, GIB, SHAPES, plan


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

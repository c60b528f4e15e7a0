"""Where weights will live: by size and room, by what is asked for, and by what is predicted to be quickest."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from shared.app.device import DeviceInfo
from shared.app.memory import MIB, TILES, MemoryEstimate, ModuleSizes
from shared.app.memory_plan import Asked, MemoryPlan, Relief, next_relief, parse_size, plan_memory, unknown_sizes
from shared.app.memory_plan.placing import UPLOAD_MB
from shared.app.streamer.bulk import MOST_THREADS, PIECE_BYTES
from shared.quant.errors import UserError

GIB = 2**30
GB = 10**9
CPU = DeviceInfo("cpu", "a CPU", None, 16 * GIB, "")


def card(gibibytes: float, capability: int = 89) -> DeviceInfo:
    return DeviceInfo("cuda", "a GPU", capability, round(gibibytes * GIB), "")


def model(transformer: float = 12.3, **changes: Any) -> MemoryEstimate:
    """The 6B model at 1024x1024; transformer: GB of its weights, 0.28 of which belong to no block."""
    block = round((transformer - 0.28) * GB / 34)
    values: dict[str, Any] = {
        "sizes": {
            "transformer": ModuleSizes(
                nbytes=34 * block + round(0.28 * GB), blocks=(block,) * 34, width=3840, hidden=10240, products=6 * GB
            ),
            "text_encoder": ModuleSizes(
                nbytes=round(7.84 * GB), blocks=(202 * MIB,) * 35, width=2560, hidden=9728, products=int(3.5 * GB)
            ),
            "vae": ModuleSizes(nbytes=round(0.33 * GB)),
        },
        "loras_mb": 0.0,
        "text_mb": 50.0,
        "denoise_mb": 440.0,
        "decode_mb": 3072.0,
        "tile": None,
        "decode_tiled_mb": {64: 768.0, 32: 192.0, 16: 48.0},
        "decode_ways": {tile: f"tiles of {tile} latent cells" for tile in TILES},
        "tokens": 4608,
    }
    return MemoryEstimate(**values | changes)


def plan(device: DeviceInfo, estimate: MemoryEstimate | None = None, **values: Any) -> MemoryPlan:
    """values: keywords of plan_memory() and of what is asked."""
    asked = Asked(**{name: values.pop(name) for name in ("offload", "profile", "cap") if name in values})
    return plan_memory(estimate or model(), device, asked=asked, **{"ram": 64 * GIB, "has_mmgp": True} | values)


# -- what fits ----------------------------------------------------------------------------------------------------


def test_a_large_card_gets_everything_and_decodes_in_one_piece() -> None:
    made = plan(card(80))

    assert (made.engine, made.tile) == ("direct", 0)
    assert made.vram_mb == pytest.approx(20.47 * GB / MIB + 3072, rel=0.01)


def test_weights_that_stay_on_a_card_take_no_ram_but_what_is_copied_on_the_way() -> None:
    """A machine with less RAM than weights draws with a card that holds them."""
    usual = model()
    sizes = {name: replace(size, mapped=size.nbytes) for name, size in usual.sizes.items()}
    sizes["text_encoder"] = replace(sizes["text_encoder"], mapped=sizes["text_encoder"].nbytes - 700 * MIB)

    resident, streamed = (plan(card(80), replace(usual, sizes=sizes), offload=how) for how in ("none", "stream"))

    assert resident.ram_mb == pytest.approx(644 + 512 + 700)
    assert streamed.ram_mb == pytest.approx(644 + 20.47 * GB / MIB, rel=0.01)


def test_the_buffers_of_an_upload_are_those_that_are_counted() -> None:
    assert 2 * MOST_THREADS * PIECE_BYTES == UPLOAD_MB * MIB


def test_a_card_that_holds_each_model_but_not_all_gets_mmgp_as_wan2gp_would() -> None:
    made = plan(card(18))

    assert made.engine == "mmgp"
    assert made.profile is not None and made.profile.number in (1, 3, 3.5)


def test_a_decode_that_takes_a_quarter_of_the_card_is_done_in_tiles() -> None:
    made = plan(card(8))

    assert made.tile == 64
    assert made.peaks_mb["decode"] < 4 * 1024
    assert any("tiles of 64" in sentence for sentence in made.sentences)


def test_a_tile_that_was_asked_for_is_kept() -> None:
    assert plan(card(8), model(tile=128, decode_mb=2900.0)).tile == 128
    assert plan(card(8), model(tile=0)).tile == 0
    assert plan(card(8), model(tile=0), relief=Relief(tile=32)).tile == 32


def test_free_memory_counts_not_the_cards() -> None:
    assert plan(card(80), free=10 * GIB).engine != "direct"


# -- which engine -------------------------------------------------------------------------------------------------


def test_the_streamer_is_taken_where_keeping_blocks_saves_copies() -> None:
    made = plan(card(12))

    assert made.engine == "stream"
    assert made.step_seconds["stream"] < 0.9 * made.step_seconds["mmgp"]
    assert "predicted" in made.reason


def test_mmgp_is_taken_where_computing_hides_all_copies() -> None:
    made = plan(card(8, capability=86), model(4.0, tokens=4 * 4608))

    assert made.step_seconds["stream"] == pytest.approx(made.step_seconds["mmgp"], rel=0.05)
    assert made.engine == "mmgp"


def test_the_prediction_of_pure_streaming_is_the_longer_of_computing_and_copying() -> None:
    made = plan(card(3, capability=89))  # room for a few blocks only

    copying, computing = 12.02 * GB / 25e9, 4608 * 6 * GB / 75e12
    assert made.step_seconds["direct"] == pytest.approx(computing)
    assert made.step_seconds["mmgp"] == pytest.approx(max(copying, computing), rel=0.02)


@pytest.mark.parametrize(("asked", "engine"), [("mmgp", "mmgp"), ("stream", "stream"), ("none", "direct")])
def test_what_is_asked_for_is_done(asked: str, engine: str) -> None:
    assert plan(card(12), offload=asked).engine == engine


def test_a_profile_asks_for_mmgp_unless_another_engine_is_named() -> None:
    assert plan(card(80), profile=4).name == "profile 4"
    assert plan(card(80), profile=4, offload="stream").engine == "stream"


def test_without_mmgp_the_streamer_does_its_work() -> None:
    assert plan(card(18), has_mmgp=False).engine == "stream"
    assert "not installed" in plan(card(18), has_mmgp=False, offload="mmgp").reason


@pytest.mark.parametrize(("asked", "named"), [({"offload": "disk"}, "auto, mmgp, stream, none"), ({"profile": 6}, "6")])
def test_unknown_kinds_name_the_known_ones(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        plan(card(12), **asked)


# -- the cap ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gigabytes", [2, 3, 4, 6, 8, 12, 16, 24])
@pytest.mark.parametrize("offload", ["auto", "stream"])
def test_no_predicted_peak_is_above_the_cap(gigabytes: int, offload: str) -> None:
    made = plan(card(24), cap=gigabytes * GIB, offload=offload)

    assert made.vram_mb <= gigabytes * 1024
    assert made.cap == gigabytes * GIB


def test_a_larger_cap_keeps_more_and_never_takes_longer() -> None:
    small = model(decode_mb=300.0)  # in one piece under every cap
    plans = [plan(card(24), small, cap=gb * GIB, offload="stream") for gb in (2, 4, 6, 8, 10, 12)]

    seconds = [made.step_seconds["stream"] for made in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert [made.budget for made in plans] == sorted(made.budget for made in plans)


def with_table() -> MemoryEstimate:
    """The published files' sizes: the table of words is told from what else belongs to no block."""
    usual = model(denoise_mb=371.0)
    sizes = {
        **usual.sizes,
        "transformer": replace(usual.sizes["transformer"], nbytes=34 * 345 * MIB + 23 * MIB, blocks=(345 * MIB,) * 34),
        "text_encoder": replace(usual.sizes["text_encoder"], nbytes=35 * 202 * MIB + 742 * MIB, table=742 * MIB),
    }
    return replace(usual, sizes=sizes)


def test_bf16_weights_go_through_less_than_a_gigabyte_and_a_half() -> None:
    """The streamer looks words up in RAM; mmgp, with their table on the GPU, is passed over."""
    made = plan(card(24), with_table(), cap=round(1.4 * GIB))

    assert made.engine == "stream" and "mmgp would keep too much" in made.reason
    assert made.vram_mb <= 1.4 * 1024 - 100
    assert made.budget / MIB + 371 <= 1.4 * 1024 - 100
    assert made.peaks_mb["text"] < 742  # the table alone


def test_a_table_of_a_model_that_fits_is_on_the_gpu_with_it() -> None:
    made = plan(card(24), with_table(), cap=10 * GIB, offload="stream")

    assert "text encoder whole in its turn" in made.words
    assert made.peaks_mb["text"] == pytest.approx(35 * 202 + 742 + 50)


def test_a_cap_that_nothing_fits_into_is_refused_with_what_it_takes() -> None:
    with pytest.raises(UserError, match=r"0\.50 GB on the GPU are too few.*takes 1\."):
        plan(card(24), cap=GIB // 2)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * GIB),
        ("3.5 GiB", 3.5 * GIB),
        ("900mb", 900 * MIB),
        ("4", 4 * GIB),
        (6, 6 * GIB),
        ("", None),
        (0, None),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | float, size: float | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["much", "-4GB", "4 apples", "4GBB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no amount of memory"):
        parse_size(text)


# -- one memory ---------------------------------------------------------------------------------------------------


def test_on_a_cpu_modules_add_up_in_the_order_in_which_they_run() -> None:
    made = plan(CPU, free=40 * GIB)

    assert list(made.peaks_mb) == ["text", "denoise", "decode"]
    assert made.peaks_mb["text"] < made.peaks_mb["denoise"]
    assert made.ram_mb == max(made.peaks_mb.values())
    assert made.vram_mb == 0


def test_a_mapped_text_encoder_does_not_count_while_drawing() -> None:
    encoder = ModuleSizes(nbytes=8 * GB, mapped=6 * GB)
    kept, mapped = (
        plan(CPU, model(sizes=model().sizes | {"text_encoder": e})) for e in (replace(encoder, mapped=0), encoder)
    )

    assert mapped.peaks_mb["text"] == kept.peaks_mb["text"]
    assert mapped.peaks_mb["denoise"] == pytest.approx(kept.peaks_mb["denoise"] - 6 * GB / MIB)


def test_a_cpu_with_little_free_ram_decodes_in_tiles() -> None:
    assert plan(CPU, free=40 * GIB).tile == 0
    assert plan(CPU, free=round(20.47 * GB) + 2 * GIB).tile in TILES


def test_weights_that_stay_in_their_files_leave_their_ram_to_the_decode() -> None:
    sizes = {name: replace(size, mapped=size.nbytes) for name, size in model().sizes.items()}

    assert plan(CPU, model(sizes=sizes), free=8 * GIB).tile == 0


def test_what_is_for_nvidia_gpus_is_said_to_do_nothing_on_a_cpu() -> None:
    assert "profile 4 is for NVIDIA" in plan(CPU, profile=4).reason
    assert "cap" in plan(CPU, cap=GIB).reason


# -- when memory ran out ------------------------------------------------------------------------------------------


def tried(stage: str, device: DeviceInfo, relief: Relief | None = None) -> list[tuple[str, int, int]]:
    """Every plan until nothing is left: engine, tile, budget."""
    relief = relief or Relief()
    found = []
    while True:
        made = plan(device, relief=relief)
        found.append((made.engine, made.tile, made.budget if made.engine == "stream" else 0))
        following = next_relief(relief, stage, made, device)
        if following is None:
            return found
        relief = following[0]
        assert len(found) < 10


def test_a_decode_gets_smaller_tiles_first_then_streamed_weights() -> None:
    plans = tried("decode", card(80))

    assert [(engine, tile) for engine, tile, _ in plans[:4]] == [("direct", t) for t in (0, 64, 32, 16)]
    assert [engine for engine, _, _ in plans[4:]] == ["stream"] * 3
    assert plans[4][2] > plans[5][2] > plans[6][2]


@pytest.mark.parametrize("stage", ["load", "text", "denoise"])
def test_other_stages_get_fewer_weights_on_the_gpu_each_time(stage: str) -> None:
    plans = tried(stage, card(80))

    assert [engine for engine, _, _ in plans] == ["direct", "stream", "stream", "stream"]
    assert plans[1][2] > plans[2][2] > plans[3][2]


def test_on_a_cpu_only_the_decode_can_do_with_less() -> None:
    assert [tile for _, tile, _ in tried("decode", CPU)] == [0, 64, 32, 16]
    assert tried("denoise", CPU) == [("direct", 0, 0)]


# -- words --------------------------------------------------------------------------------------------------------


def test_the_plan_says_what_stays_in_words_and_json() -> None:
    made = plan(card(8), offload="stream", ram=32 * GIB)

    assert any("transformer with" in s and "of 34 blocks kept" in s for s in made.sentences)
    assert json.loads(json.dumps(made.as_dict()))["engine"] == "stream"


def test_before_the_files_are_here_the_choice_is_what_was_asked_for() -> None:
    assert unknown_sizes(card(8), Asked())[0] == "auto"
    assert unknown_sizes(card(8), Asked(profile=4))[0] == "profile 4"
    assert unknown_sizes(card(8), Asked(offload="stream"))[0] == "stream"
    assert unknown_sizes(CPU, Asked(profile=4))[0] == "direct"


# -- a decoder that comes to the GPU ----------------------------------------------------------------------------------

BESIDE: dict[str, Any] = {
    "decodes_beside": True, "saved_mb": 80.0, "decode_mb": 1026.0,
    "decode_tiled_mb": {128: 552.0, 64: 497.0, 32: 226.0, 16: 226.0},
    "decode_ways": {128: "bands of rows", 64: "tiles of 64", 32: "tiles of 32", 16: "tiles of 16"},
}  # fmt: skip


def test_where_all_weights_stay_it_decodes_in_one_piece_without_the_vae_s_own() -> None:
    made = plan(card(80), model(**BESIDE))

    assert (made.engine, made.tile) == ("direct", 0)
    weights = sum(model().weights_mb.values())
    assert made.peaks_mb["decode"] == pytest.approx(weights - 80 + 1026)
    assert made.peaks_mb["denoise"] == pytest.approx(weights + 440)


def test_weights_come_before_a_decode_in_one_piece() -> None:
    made = plan(card(24), model(**BESIDE), free=round(21.5 * GB))  # 20.5 of weights, and not 1.5 beside them

    assert made.tile == 128
    assert "The picture is decoded in bands of rows: 552 MiB instead of 1,026." in made.sentences


def test_where_weights_are_moved_the_transformer_stays_for_a_decode_in_bands() -> None:
    made = plan(card(8), model(**BESIDE), offload="stream")

    assert (made.engine, made.tile) == ("stream", 128)
    assert made.peaks_mb["decode"] - made.peaks_mb["denoise"] == pytest.approx(552 - 440)


def test_bands_that_are_too_much_become_tiles() -> None:
    assert plan(card(8), model(**BESIDE), cap=2 * GIB).tile == 64
    assert plan(card(8), model(**BESIDE), relief=Relief(tile=32)).tile == 32


def test_a_decode_that_runs_out_of_memory_goes_from_one_piece_to_bands_to_tiles() -> None:
    device, relief, tried = card(80), Relief(), []
    made = plan(device, model(**BESIDE))
    while made.tile != 16:
        found = next_relief(relief, "decode", made, device)
        assert found is not None
        relief, words = found
        tried.append(words.removeprefix("the picture is decoded in "))
        made = plan(device, model(**BESIDE), relief=relief)

    assert tried == list(BESIDE["decode_ways"].values())

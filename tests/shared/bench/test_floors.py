"""Floors by measured roofs: worked by hand once, and goals held against them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.bench import programs
from shared.bench.floors import ATTENTION, DEVICE_MEMORY, Find, Loaded, Network, Streamed, Work, best_rate, together
from shared.bench.goals import GOALS, Check, Goal
from shared.bench.machine import Machine
from shared.bench.measure import CpuClock
from shared.bench.programs import PeerProgram, program_cases
from shared.bench.results import Record, Results, Row, Value
from shared.bench.stand import Stand
from shared.bench.verdict import judge

BF16, INT8 = ("bf16",), ("int8",)

# 2 GFLOP per ms in bf16, 4 in int8 (3 at another shape), 0.5 in attention; 10 GB/s to the device, 2000 on it.
ROOFS = (
    Row("64 x 64", "raw bf16", {"ms": 5.0, "gflop": 10.0}),
    Row("64 x 64", "raw int8", {"ms": 2.5, "gflop": 10.0}),
    Row("128 x 64", "raw int8", {"ms": 10.0, "gflop": 30.0}),
    Row("attention, 64 tokens", "raw flash", {"ms": 4.0, "gflop": 2.0}),
    Row("attention, 64 tokens", "raw cudnn", {"outcome": "no such kernel"}),
    Row("copy on the device, 1 MB", "raw", {"ms": 1.0, "gb": 2.0}),
    Row("page cache, 16 MB", "raw", {"ms": 50.0, "gb": 1.0}),
    Row("pinned copy, 16 MiB", "raw up", {"ms": 100.0, "gb": 1.0}),
    Row("pinned copy, 16 MiB", "raw down", {"ms": 10.0, "gb": 1.0}),
)


def finder(record: Record, **rows: tuple[Row, ...]) -> Find:
    """Finds cases with these rows."""
    return lambda case: replace(record, case=case, rows=rows[case]) if case in rows else None


def test_products_and_attention_take_their_time_at_their_own_rates(record: Record) -> None:
    work = Work(products={INT8: 40.0, BF16: 2.0}, attention=1.0, roofs="C0")

    assert work.ms(finder(record, C0=ROOFS), {}) == pytest.approx(40 / 4 + 2 / 2 + 1 / 0.5)
    assert work.ms(finder(record), {}) is None, "nobody measured the roofs"
    assert work.ms(finder(record, C0=ROOFS[3:]), {}) is None, "no products among them"


def test_the_best_of_several_types_counts() -> None:
    assert best_rate(ROOFS, ("bf16", "int8")) == 4.0
    assert best_rate(ROOFS, ("fp8",)) == 0.0


def test_reading_counts_where_it_takes_longer_than_computing(record: Record) -> None:
    read = Work(products={BF16: 2.0}, gigabytes=10.0, roofs="B0")

    assert read.ms(finder(record, B0=ROOFS), {}) == pytest.approx(5.0)
    assert replace(read, gigabytes=1.0).ms(finder(record, B0=ROOFS), {}) == pytest.approx(1.0)


def test_work_one_after_the_other_is_added_up() -> None:
    both = together(
        Work(products={BF16: 1.0}, attention=2.0, roofs="B0"), Work(products={BF16: 3.0, INT8: 5.0}, roofs="B0")
    )

    assert both == Work(products={BF16: 4.0, INT8: 5.0}, attention=2.0, roofs="B0")


def test_batches_and_refiners_of_another_type_are_told_apart() -> None:
    one = Network().work(256, 45, INT8, roofs="C0", refined_in=BF16)
    many = Network().work(256, 45, INT8, roofs="C0", refined_in=BF16, forwards=4, pictures=2)

    assert one.products[BF16] == pytest.approx(2 * 256 * 353.894e-3, rel=1e-4)
    assert one.products[INT8] == pytest.approx(30 * 320 * 353.894e-3, rel=1e-4)
    assert many.at({"int8": 1, "bf16": 1, ATTENTION: 1}) == pytest.approx(
        8 * sum((*one.products.values(), one.attention))
    )


def streamed(weights: float, room: float) -> Mapping[str, Value]:
    return {"denoise_seconds": 8.0, "forwards": 8, "weights_gb": weights, "room_gb": room}


@pytest.mark.parametrize(("weights", "room", "ms"), [(12.0, 4.0, 800.0), (12.0, 11.0, 250.0), (12.0, 14.0, 250.0)])
def test_streaming_takes_the_longer_of_computing_and_copying_what_has_no_room(
    record: Record, weights: float, room: float, ms: float
) -> None:
    free = (Row("z, no cap", "ours", {"denoise_seconds": 2.0, "forwards": 8}),)
    floor = Streamed(computing=("z, no cap", "ours"))

    assert floor.ms(finder(record, B0=ROOFS, B5=free), streamed(weights, room)) == pytest.approx(ms)
    assert floor.ms(finder(record, B5=free), streamed(weights, room)) is None
    assert floor.ms(finder(record, B0=ROOFS), streamed(weights, room)) is None


def test_loading_is_held_against_the_slower_of_reading_and_the_link(record: Record) -> None:
    assert Loaded().ms(finder(record, B0=ROOFS), {"files_gb": 2.0}) == pytest.approx(200.0)
    assert Loaded().ms(finder(record, B0=ROOFS[-2:]), {"files_gb": 2.0}) is None, "nobody measured reading"
    assert Loaded().ms(finder(record, B0=ROOFS), {}) is None


def verdict_of(check: Check, machine: Machine, *records: Record) -> tuple[bool | None, str, str]:
    goal = Goal(section="S", metric="m", goal="g", hardware="CPU", check=check)
    found = judge(goal, [Results(machine, {r.case: r for r in records})])
    return found.met, found.ours, found.peer


def test_a_share_of_the_roof_is_told_with_both_times(machine: Machine, record: Record) -> None:
    roofs = replace(record, case="C0", rows=ROOFS)
    share = Check(case="C1", row="one forward", bound=70, at_most=False, unit="%",
                  floor=Work(products={BF16: 6.0}, roofs="C0"))  # fmt: skip

    assert verdict_of(share, machine, record, roofs) == (True, "75 % (4 ms)", "3 ms by C0's rates")
    assert verdict_of(replace(share, bound=76), machine, record, roofs)[0] is False
    assert verdict_of(share, machine, record) == (None, "", ""), "without roofs nothing is judged"


def test_what_failed_is_missed_and_not_merely_unmeasured(machine: Machine, record: Record) -> None:
    failed = replace(record, rows=(Row("one forward", "ours", {"outcome": "out of memory"}),))

    assert verdict_of(Check(case="C1", row="one forward", bound=5), machine, failed) == (False, "out of memory", "")


def test_every_goal_has_a_check() -> None:
    assert [goal.metric for goal in GOALS if goal.check is None] == []


def test_every_assumed_share_is_one_that_can_be_reached() -> None:
    shares = [goal for goal in GOALS if goal.check is not None and goal.check.unit == "%" and goal.check.floor]

    assert len(shares) >= 14
    assert all(10 <= goal.check.bound < 100 for goal in shares if goal.check is not None)
    assert ATTENTION != DEVICE_MEMORY


def answer(_program: object, command: Sequence[str], _environment: object) -> tuple[str, str, Mapping[str, float]]:
    """What a process would print: a plan, pictures of one process, or a picture."""
    told: Any = {"seconds": {"load": 1.0, "denoise": 1.0}, "forwards": 8, "peak_vram_mb": 1000.0}
    if "--dry-run" in command:
        memory = {"weights_mb": {"transformer": 12000.0}, "budget_mb": 4000.0, "vram_mb": 1.0, "engine": "stream"}
        told = {
            "files": [{"role": r, "path": __file__, "bytes": 10**9} for r in ("transformer", "text_encoder", "vae")]
        }
        told["memory"] = memory
    elif "shared.bench.one_session" in command:
        told |= {"wall_seconds": 1.0, "peak_rss_mb": 5.0}
        told = [{"preset": p, "picture": n, **told} for p in command[3].split(",") for n in (1, 2)]
    return json.dumps(told), "", {}


def test_goals_of_whole_programs_find_their_rows(
    tmp_path: Path, machine: Machine, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs._Program, "_process", answer)
    presets = ["z_image", "z_image_int8", "z_image_nunchaku_r256_int4", "z_image_nunchaku_r128_fp4"]
    ways = ("model offload", "sequential offload", "group offload, blocks", "group offload, leaves")
    peer = PeerProgram(module="a_peer", whole="all on the GPU", offloading=ways)
    records = [replace(record, case="B0", rows=ROOFS)]
    work = program_cases(tmp_path, presets, caps=(6.0, 4.0, 3.5, 3.0, 1.5), peer=peer)
    for case in ("B5", "B6"):
        stand = Stand(device=torch.device("cpu"), clock=CpuClock(), peers=frozenset({"P1", "P5", "P6"}),
                      folder=tmp_path, repeats=1)  # fmt: skip
        work[case](stand)
        records.append(replace(record, case=case, rows=tuple(stand.rows)))
    card = replace(machine, gpu="NVIDIA H200")

    verdicts = {
        goal.metric: judge(goal, [Results(card, {r.case: r for r in records})])
        for goal in GOALS
        if goal.check is not None and goal.check.case in ("B5", "B6")
    }

    assert len(verdicts) >= 20
    assert [metric for metric, verdict in verdicts.items() if verdict.met is None] == []
    # 8.4 of 12.6 GB through 10 GB/s are 839 ms; a step takes 125.
    assert verdicts["a forward in bf16, streamed in 6 GB"].peer == "839 ms by B0's rates"
    assert verdicts["a forward in bf16, streamed in 6 GB"].ours == "0.15 x (125 ms)"

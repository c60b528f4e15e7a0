"""What a case function's stand keeps of a comparison."""

from __future__ import annotations

import math

import pytest
import torch

from shared.bench.stand import Stand, relative_error


def test_each_contender_gets_a_row_with_time_error_and_facts(stand: Stand) -> None:
    exact = torch.tensor([3.0, 4.0])
    contenders = {"ours": lambda: exact + torch.tensor([0.0, 0.5]), "P1": lambda: exact, "raw": lambda: None}

    taken = stand.compare("a row", contenders, reference=exact, facts={"ours": {"tokens": 7}})

    assert taken == {"ours": 1.0, "P1": 2.0, "raw": 3.0}
    values = {row.who: row.values for row in stand.rows}
    assert {row.row for row in stand.rows} == {"a row"}
    assert values["ours"]["error"] == 0.1
    assert values["ours"]["tokens"] == 7
    assert values["P1"]["error"] == 0.0
    assert "error" not in values["raw"]


def test_peers_that_a_run_leaves_out_are_not_called(stand: Stand) -> None:
    def never() -> None:
        raise AssertionError("called")

    stand.compare("a row", {"ours": lambda: None, "P3": never, "P2 bf16": never})

    assert [row.who for row in stand.rows] == ["ours"]


def test_a_contender_that_fails_says_why_and_the_others_go_on(stand: Stand) -> None:
    turns = iter(range(9))

    def late() -> None:
        if next(turns) == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GB")

    def never() -> None:
        raise ValueError("no such kernel\n\nstack")

    taken = stand.compare("a row", {"ours": lambda: None, "P1": never, "ours late": late}, reference="P1",
                          facts={"P1": {"tokens": 7}})  # fmt: skip

    assert set(taken) == {"ours"}
    values = {row.who: row.values for row in stand.rows}
    assert values["P1"] == {"outcome": "ValueError: no such kernel", "tokens": 7}
    assert values["ours late"] == {"outcome": "out of memory"}
    assert "ms" in values["ours"] and "error" not in values["ours"]


def test_pictures_are_told_apart_as_people_see_them(stand: Stand) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    noisy = exact + 0.05 * torch.randn(exact.shape, generator=generator)

    stand.compare("a row", {"ours": lambda: noisy, "P1": lambda: exact}, reference=exact, pictures=True)

    ours, theirs = (row.values for row in stand.rows)
    assert (theirs["ssim"], theirs["psnr"]) == (1.0, 99.0)
    assert 0.9 < float(ours["ssim"]) < 1
    assert float(ours["psnr"]) == pytest.approx(20 * math.log10(2 / 0.05), abs=1), "0.05 of a range of 2"


def test_memory_is_what_the_second_call_takes(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"now": 100, "most": 0}
    for name, answer in {
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: memory.update(most=memory["now"]),
        "memory_allocated": lambda: memory["now"],
        "max_memory_allocated": lambda: memory["most"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    stand.device = torch.device("cuda")
    calls = iter([(3e9, 2e9), (1.5e9, 0), (1.5e9, 0)])  # the first keeps 2 GB

    def work() -> None:
        at_once, kept = next(calls)
        memory["most"] = max(memory["most"], memory["now"] + at_once)
        memory["now"] += kept

    stand.compare("a row", {"ours": work}, memory=True, repeats=2)

    assert stand.rows[0].values["peak_mb"] == 1500.0


def test_names_of_ours_are_no_peers(stand: Stand) -> None:
    assert stand.wants("ours int8")
    assert stand.wants("raw")
    assert stand.wants("P1 float32")
    assert not stand.wants("P7")


def test_the_error_is_relative_to_the_reference_in_float32() -> None:
    reference = torch.tensor([30.0, 40.0])

    error = relative_error(torch.tensor([30.0, 45.0]).bfloat16(), reference)

    assert error == pytest.approx(0.1)


def test_notes_and_records_are_kept(stand: Stand) -> None:
    stand.record("counted", "ours", {"forwards": 8})
    stand.note("P6 is not installed.")

    assert [(row.row, row.values) for row in stand.rows] == [("counted", {"forwards": 8})]
    assert stand.notes == ["P6 is not installed."]

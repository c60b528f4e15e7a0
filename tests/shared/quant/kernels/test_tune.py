"""Tuning keeps what is clearly faster and right, within its time, and what it wrote is used at the next start."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.cli.tune import tune
from shared.ops import triton_ready, tuning
from shared.quant.errors import UserError
from shared.quant.kernels import tune as tuner
from shared.quant.kernels.tune import Entry, Found, Work, as_entries, entries_for, matmul_candidates, search

SLOW, FAST, WRONG, BROKEN = ({"num_warps": n} for n in (4, 8, 16, 32))
RIGHT = torch.ones(8)


class Card:
    """A pretended one: its kernel's numbers and time follow from the launch options, and time passes as it works."""

    def __init__(self) -> None:
        self.seconds_of = {4: 1.0, 8: 0.5, 16: 0.1, 32: 0.2}
        self.now = 0.0
        self.launched: list[int] = []

    def run(self) -> Tensor:
        warps = tuning.launch("row", 89, 4096)["num_warps"]
        self.launched.append(warps)
        if warps == BROKEN["num_warps"]:
            raise RuntimeError("out of resource: shared memory")
        return RIGHT * (1.5 if warps == WRONG["num_warps"] else 1.001)

    def seconds(self, run: Callable[[], object]) -> float:
        run()
        self.now += 10.0  # compiling
        return self.seconds_of[self.launched[-1]]

    def entry(self, options: tuning.Launch = SLOW, bound: int | None = 4096) -> Entry:
        candidates = (SLOW, FAST, WRONG, BROKEN)
        works = [Work(self.run, lambda: RIGHT)]
        return Entry(kernel="row", bound=bound, options=options, candidates=candidates, make=lambda: works)


@pytest.fixture
def card() -> Card:
    return Card()


def test_the_fastest_that_is_right_is_found(card: Card) -> None:
    (found,) = search([card.entry()], card.seconds, clock=lambda: card.now)

    assert (found.options, found.seconds, found.before) == (FAST, 0.5, 1.0)
    assert found.wrong == (WRONG,)  # though it is quicker
    assert (found.tried, found.left) == (4, 0)
    assert found.words == "row, up to 4096: 500.000 ms, before 1000.000 (4 tried, 1 gave wrong numbers)"


def test_the_present_options_stay_unless_others_are_clearly_faster(card: Card) -> None:
    card.seconds_of = {4: 1.0, 8: 0.98}

    (found,) = search([card.entry()], card.seconds, clock=lambda: card.now)

    assert found.options == SLOW and found.seconds == found.before == 1.0


def test_present_options_that_do_not_run_are_replaced(card: Card) -> None:
    (found,) = search([card.entry(options=BROKEN)], card.seconds, clock=lambda: card.now)

    assert found.options == FAST and found.before is None


def test_an_entry_of_which_nothing_runs_is_left_out(card: Card) -> None:
    entry = Entry(
        kernel="row", bound=None, options=BROKEN, candidates=[WRONG], make=lambda: [Work(card.run, lambda: RIGHT)]
    )

    assert list(search([entry], card.seconds)) == []


def test_so_is_one_for_which_memory_is_short(card: Card) -> None:
    def full() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    entry = Entry(kernel="row", bound=None, options=SLOW, candidates=[FAST], make=full)

    assert [one.bound for one in search([entry, card.entry()], card.seconds)] == [4096]


def test_time_is_shared_and_what_is_left_goes_on(card: Card) -> None:
    """Three entries of two good candidates, 10 s each: with 25 s the first has time for two, and so have the others."""
    few = [card.entry(bound=bound) for bound in (1, 2, 3)]

    found = list(search(few, card.seconds, budget=25.0, clock=lambda: card.now))

    assert [one.tried for one in found] == [2, 2, 2]  # never less: else nothing could be found out
    assert all(one.left == 2 and one.options == FAST for one in found)
    assert found[0].words.endswith("(2 tried, 2 not tried for want of time)")


def test_options_that_are_tried_are_forgotten_afterwards() -> None:
    before = tuning.launch("row", 89, 4096)
    with tuning.trying("row", {"num_warps": 32}):
        assert tuning.launch("row", 89, 4096) == {"num_warps": 32}
        assert tuning.launch("stretch", 89, 4096) != {"num_warps": 32}

    assert tuning.launch("row", 89, 4096) == before


def test_every_entry_of_the_programs_table_is_tuned_once_and_large_products_last() -> None:
    entries = entries_for(torch.device("cpu"), 89)

    listed = [(kernel, bound) for kernel, lines in tuning.read()["89"].items() for bound, _ in lines]
    assert sorted(map(str, ((e.kernel, e.bound) for e in entries))) == sorted(map(str, listed))
    assert [(e.kernel, e.bound) for e in entries[-2:]] == [("int8 matmul", None), ("fp8 matmul", None)]
    for entry in entries:
        assert all(options.keys() == entry.options.keys() for options in entry.candidates), entry.kernel
    assert "fp8 matmul" not in {entry.kernel for entry in entries_for(torch.device("cpu"), 86)}


def test_candidates_differ() -> None:
    found = [tuple(sorted(options.items())) for options in matmul_candidates()]

    assert len(set(found)) == len(found) > 20


def test_bounds_that_were_not_measured_keep_what_they_had() -> None:
    one = Found(kernel="row", bound=4096, options=FAST, seconds=1.0, before=2.0, tried=2, left=0)

    entries = as_entries([one], tuning.read()["89"])

    had = tuning.read()["89"]["row"]
    assert entries == {"row": [had[0], [4096, FAST], had[2]]}


@pytest.fixture
def machine_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this machine's figures lie, in the place of the real one."""
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setattr(tuning, "MACHINE_FILE", path)
    tuning.known.cache_clear()
    yield path
    tuning.known.cache_clear()


def test_what_was_written_goes_before_the_programs_table(machine_file: Path) -> None:
    usual = tuning.launch("stretch", 89, 1)

    tuning.write({"row": [[None, {"num_warps": 2}]]}, 89, "a card")

    assert tuning.launch("row", 89, 4096) == {"num_warps": 2}
    assert tuning.launch("stretch", 89, 1) == usual  # not measured
    assert tuning.launch("row", 90, 4096) == tuning.read()["90"]["row"][1][1]  # another card's
    tuning.write({"row": [[None, {"num_warps": 1}]]}, 110, "a new card")
    assert tuning.launch("row", 89, 4096) == {"num_warps": 2}
    assert tuning.launch("row", 110, 4096) == {"num_warps": 1}
    assert json.loads(machine_file.read_text(encoding="utf-8"))["measured"] == {"89": "a card", "110": "a new card"}


def test_it_can_be_left_out(machine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.write({"row": [[None, {"num_warps": 2}]]}, 89, "a card")
    monkeypatch.setenv(tuning.SWITCH, "0")
    tuning.known.cache_clear()

    assert tuning.known() == tuning.read()


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"architectures": {"89": {"row": [[null, {"num_warps": "8"}]]}}}',
        '{"architectures": {"89": {"row": [[null, {"warps": 8}]]}}}',
        '{"architectures": {"89": {"row": [[4096, {"num_warps": 8}]]}}}',
        '{"architectures": {"89": {"row": []}}}',
        '{"architectures": {"89": {"nothing": [[null, {"num_warps": 8}]]}}}',
        '{"architectures": {"ninety": {}}}',
    ],
)
def test_a_damaged_file_is_left_aside_with_a_word(
    machine_file: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine_file.parent.mkdir()
    machine_file.write_text(text, encoding="utf-8")

    assert tuning.known() == tuning.read()
    assert "is left aside" in caplog.text and str(machine_file) in caplog.text
    tuning.write({"row": [[None, {"num_warps": 2}]]}, 89, "a card")
    assert tuning.launch("row", 89, 4096) == {"num_warps": 2}


def test_the_command_measures_writes_and_tells(
    machine_file: Path, card: Card, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Pretended GPU")
    monkeypatch.setattr(triton_ready, "why_not", lambda _device: None)
    monkeypatch.setattr(triton_ready, "capability", lambda _device: 89)
    monkeypatch.setattr(tuner, "entries_for", lambda _device, _capability: [card.entry()])
    monkeypatch.setattr(tuner, "seconds_on", lambda _device: card.seconds)

    assert tune(argparse.Namespace(verbose=1, json=True)) == 0

    out, told = capsys.readouterr()
    report = json.loads(out)
    assert report["changed"] == 1 and report["file"] == str(machine_file)
    assert report["entries"][0]["options"] == FAST
    assert report["measured_with"].startswith("Pretended GPU, torch ")
    assert "row, up to 4096" in told
    assert tuning.launch("row", 89, 4096) == FAST


def test_without_a_gpu_nothing_is_measured(machine_file: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")

    with pytest.raises(UserError, match="there is no NVIDIA GPU"):
        tune(argparse.Namespace(verbose=0, json=False))
    assert not machine_file.exists()

"""Gated counters: the program's own must be what the file says, to the last operation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.z_image.bench.counting import counters
from shared.bench import gates
from shared.bench.machine import versions
from shared.bench.results import Record, Row
from shared.bench.stand import Stand


@pytest.fixture
def counted(record: Record) -> Record:
    return replace(record, case="C7", rows=(Row("one forward", "ours", {"ops": 100, "host_reads": 0}),))


def test_what_was_written_is_held(tmp_path: Path, counted: Record) -> None:
    path = tmp_path / "gates.json"

    assert gates.write([counted], path) == []
    assert gates.problems([counted], path) == []


def test_a_counter_that_changed_is_named_with_both_figures(tmp_path: Path, counted: Record) -> None:
    gates.write([counted], tmp_path / "gates.json")
    changed = replace(counted, rows=(Row("one forward", "ours", {"ops": 101, "host_reads": 0}),))

    problems = gates.problems([changed], tmp_path / "gates.json")

    assert len(problems) == 1
    assert problems[0].startswith("one forward: ops is 101, the gate says 100.")
    assert "--write-gates" in problems[0]


def test_a_counter_that_went_is_named_and_a_new_one_is_free(tmp_path: Path, counted: Record) -> None:
    gates.write([counted], tmp_path / "gates.json")
    other = replace(counted, rows=(Row("a new one", "ours", {"forwards": 8}),))

    problems = gates.problems([other], tmp_path / "gates.json")

    assert [p.partition(".")[0] for p in problems] == [
        "one forward: ops is not counted, the gate says 100",
        "one forward: host_reads is not counted, the gate says 0",
    ]


def test_another_torch_is_not_bound(tmp_path: Path, counted: Record) -> None:
    gates.write([counted], tmp_path / "gates.json")
    changed = replace(counted, rows=(), versions={"torch": "2.11.0+cu130"})

    assert gates.problems([changed], tmp_path / "gates.json") == []


def test_writing_gates_without_the_counters_says_so(tmp_path: Path, record: Record) -> None:
    assert "add C7 to --cases" in gates.write([record], tmp_path / "gates.json")[0]
    assert not (tmp_path / "gates.json").exists()


def test_the_programs_counters_are_those_of_the_gates(stand: Stand, record: Record) -> None:
    with torch.no_grad():
        counters(stand)

    counted = replace(record, case="C7", versions=versions(), rows=tuple(stand.rows))
    assert gates.problems([counted]) == []
    assert {int(row.values["host_reads"]) for row in counted.rows} == {0}, "the loop waits for the device"
    assert gates.rows_of(counted).keys() <= json.loads(gates.PATH.read_text(encoding="utf-8"))["rows"].keys()

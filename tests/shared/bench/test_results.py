"""Result files: written, merged by case, read back, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shared.bench.machine import Machine
from shared.bench.results import FOLDER, Record, default_path, merge, read, read_all
from shared.quant.errors import UserError


def test_what_is_written_is_read_back(tmp_path: Path, machine: Machine, record: Record) -> None:
    merge(tmp_path / "r.json", machine, [record])

    found = read(tmp_path / "r.json")

    assert found.machine == machine
    assert found.cases == {"C1": record}
    assert found.cases["C1"].find("one forward", "P1")["ms"] == 14.0
    assert found.cases["C1"].find("one forward", "P3") == {}


def test_a_later_run_takes_its_cases_place_and_leaves_the_others(
    tmp_path: Path, machine: Machine, record: Record
) -> None:
    other, later = replace(record, case="C2"), replace(record, commit="999999999")
    merge(tmp_path / "r.json", machine, [record, other])

    merge(tmp_path / "r.json", machine, [later])

    assert {case: r.commit for case, r in read(tmp_path / "r.json").cases.items()} == {
        "C1": "999999999", "C2": "abcdef123",
    }  # fmt: skip


def test_what_was_cut_short_takes_no_finished_ones_place_unless_it_has_more(
    tmp_path: Path, machine: Machine, record: Record
) -> None:
    cut = replace(record, commit="cut", finished=False)
    path = tmp_path / "r.json"

    def kept(given: Record) -> str:
        merge(path, machine, [given])
        return read(path).cases["C1"].commit

    assert kept(cut) == "cut"
    assert kept(replace(cut, commit="longer")) == "longer"
    assert kept(record) == record.commit
    assert kept(replace(cut, rows=record.rows[:1])) == record.commit
    assert kept(replace(cut, rows=record.rows * 2)) == "cut"
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"], "nothing half-written is left"


def test_another_machines_file_is_left_alone(tmp_path: Path, machine: Machine, record: Record) -> None:
    merge(tmp_path / "r.json", machine, [record])

    with pytest.raises(UserError, match="holds figures of 4 cores of Some CPU"):
        merge(tmp_path / "r.json", replace(machine, cpu="Another"), [record])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "machine": {}, "cases": {}}', "null"])
def test_what_is_no_result_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.json").write_text(text)

    with pytest.raises(UserError, match=r"odd\.json: not a result file"):
        read(tmp_path / "odd.json")


def test_a_file_of_a_later_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text(json.dumps({"format": 2}))

    with pytest.raises(UserError, match="results of format 2"):
        read(tmp_path / "new.json")


def test_a_file_is_named_after_the_machine_and_the_day(machine: Machine) -> None:
    assert default_path(machine, "2026-01-02T03:04:05Z") == FOLDER / "some-cpu-4-cores_2026-01-02.json"
    card = replace(machine, gpu="NVIDIA H200")
    assert default_path(card, "2026-01-02").name == "nvidia-h200_2026-01-02.json"
    assert default_path(card, "2026-01-02", "demo,b 6,1.5").name == "nvidia-h200_2026-01-02_demo-b-6-1.5.json"


def test_every_result_that_comes_with_the_program_is_readable() -> None:
    names = [path.name for path in FOLDER.glob("*.json")]

    assert len(read_all()) == len(names) > 0

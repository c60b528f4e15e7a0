"""Cases are run one by one, with what a record has to hold; what cannot be run here is refused beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.app.families import load_families
from shared.bench.cases import CASES, Case
from shared.bench.run import Options, find_work, run_cases
from shared.bench.stand import Stand
from shared.quant.errors import UserError

PROGRAM = Path(__file__).parents[3]
CPU_CASE = Case("C1", "something", "small", "ms", ("P1",))
GPU_CASE = Case("B1", "something", "large", "ms", needs_gpu=True)


@pytest.fixture
def options() -> Options:
    return Options(peers=frozenset({"P1", "P3"}), command="python wgp.py bench", root=PROGRAM, repeats=1)


def test_a_record_tells_how_with_what_and_when(options: Options) -> None:
    def work(stand: Stand) -> None:
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        assert stand.peers == {"P1"}, "only those peers that the case knows"
        stand.compare("a row", {"ours": lambda: None})
        stand.note("Said.")

    threads = torch.get_num_threads()

    (record,) = run_cases([CPU_CASE], {"C1": work}, options)

    assert (record.case, record.command, record.notes) == ("C1", "python wgp.py bench", ("Said.",))
    assert record.how.startswith("CPU time of one thread")
    assert {"python", "torch", "diffusers"} <= record.versions.keys()
    assert record.date.endswith("Z")
    assert torch.get_num_threads() == threads


def test_what_was_measured_before_an_interrupt_is_kept(options: Options) -> None:
    def work(stand: Stand) -> None:
        stand.record("first", "ours", {"ms": 1.0})
        raise KeyboardInterrupt

    records = run_cases([CPU_CASE, CPU_CASE], {"C1": work}, options)

    record = next(records)
    assert [row.row for row in record.rows] == ["first"]
    assert record.notes == ("Interrupted after 1 figures; the rest was not measured.",)
    with pytest.raises(KeyboardInterrupt):
        next(records)


def test_a_case_that_fails_is_told_and_leaves_the_next_its_turn(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(stand: Stand) -> None:
        stand.record("first", "ours", {"ms": 1.0})
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    cases = [CPU_CASE, replace(CPU_CASE, id="C2")]
    failed, done = run_cases(cases, {"C1": fails, "C2": lambda stand: None}, options)

    assert [row.row for row in failed.rows] == ["first"]
    reason = "RuntimeError: CUDA error: an illegal memory access"
    assert failed.notes == (f"Failed after 1 figures ({reason}); the rest was not measured.",)
    assert (failed.finished, done.finished) == (False, True)
    assert "Traceback" in capsys.readouterr().err


def test_what_a_case_has_measured_is_kept_while_it_runs(options: Options) -> None:
    kept: list[tuple[int, bool]] = []

    def work(stand: Stand) -> None:
        stand.compare("first", {"ours": lambda: None})
        stand.record("second", "ours", {"ms": 1.0})

    list(run_cases([CPU_CASE], {"C1": work}, replace(options, keep=lambda r: kept.append((len(r.rows), r.finished)))))

    assert kept == [(1, False), (2, False)]


def test_the_folder_is_gone_afterwards(options: Options) -> None:
    folders: list[Path] = []

    list(run_cases([CPU_CASE], {"C1": lambda stand: folders.append(stand.folder)}, options))

    assert not folders[0].exists()


def test_cases_for_a_gpu_are_refused_politely_before_anything_runs(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran: list[str] = []

    with pytest.raises(UserError, match="B1 needs an NVIDIA GPU") as caught:
        list(run_cases([CPU_CASE, GPU_CASE], {"C1": lambda stand: ran.append("C1")}, options))

    assert "C* runs on every machine" in str(caught.value.hint)
    assert ran == []


def test_every_case_of_the_table_has_work_and_no_work_lacks_a_case() -> None:
    work = find_work(load_families(PROGRAM / "models"), PROGRAM, ["z_image_demo"])

    assert set(work) == {case.id for case in CASES}


def test_a_case_that_no_family_knows_is_named(options: Options) -> None:
    with pytest.raises(UserError, match="No model family here can run C1"):
        list(run_cases([CPU_CASE], {}, options))

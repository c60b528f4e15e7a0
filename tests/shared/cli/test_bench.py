"""The subcommand `bench`: what it prints, what it writes, when it fails."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.app.families import load_families
from shared.bench import gates, run
from shared.bench.results import read
from shared.bench.stand import Stand
from shared.cli import bench as command
from shared.quant.errors import UserError

PROGRAM = Path(__file__).parents[3]


@pytest.fixture
def ctx(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A program whose C1 and C7 take no time."""

    def compare(stand: Stand) -> None:
        stand.compare("one forward", {"ours": lambda: None, "P1": lambda: None, "P2": lambda: None})

    def counted(stand: Stand) -> None:
        stand.record("one forward", "ours", {"ops": 100})

    monkeypatch.setattr(run, "find_work", lambda *args: {"C1": compare, "C7": counted})
    return SimpleNamespace(root=PROGRAM, families=load_families(PROGRAM / "models"))


def flags(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verbose", type=int, default=0)
    command.add_arguments(parser)
    return parser.parse_args(argv)


def test_without_cases_they_are_listed(ctx: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.bench(ctx, flags()) == 0

    assert capsys.readouterr().out.startswith("B0  roofs of the GPU")


def test_a_card_for_people_then_one_json_object(ctx: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"

    assert command.bench(ctx, flags("--cases", "C1", "--repeats", "3", "--out", str(out))) == 0

    *card, last = capsys.readouterr().out.splitlines()
    assert card[0] == "C1  dispatch: what a forward costs beside its arithmetic"
    assert any("diffusers, eager" in line for line in card)
    assert not any("torch.compile" in line for line in card), "compiling is left out unless asked for"
    given = json.loads(last)
    assert [row["who"] for row in given["cases"]["C1"]["rows"]] == ["ours", "P1"]
    assert given["cases"]["C1"]["command"] == 'python wgp.py bench --cases "C1" --repeats "3"'
    assert read(out).cases["C1"].rows[0].values["repeats"] == 3


def test_json_alone_is_one_line(ctx: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.bench(ctx, flags("--cases", "C1", "--peers", "all", "--json", "--out", str(tmp_path / "f.json")))

    (line,) = capsys.readouterr().out.splitlines()
    assert [row["who"] for row in json.loads(line)["cases"]["C1"]["rows"]] == ["ours", "P1", "P2"]


def test_a_case_that_fails_fails_the_run_and_the_others_are_kept(
    ctx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figures.json"

    def fails(stand: Stand) -> None:
        stand.record("first", "ours", {"ms": 1.0})
        assert [row.row for row in read(out).cases["C1"].rows] == ["first"], "kept at once"
        raise RuntimeError("a bug")

    work = {"C1": fails, "C7": lambda stand: stand.record("one forward", "ours", {"ops": 1})}
    monkeypatch.setattr(run, "find_work", lambda *args: work)
    monkeypatch.setattr(gates, "PATH", tmp_path / "gates.json")

    assert command.bench(ctx, flags("--cases", "C1,C7", "--json", "--out", str(out))) == 1

    found = read(out).cases
    assert found["C1"].notes == ("Failed after 1 figures (RuntimeError: a bug); the rest was not measured.",)
    assert found["C7"].finished


def test_a_gated_counter_that_changed_fails_the_run(
    ctx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gates, "PATH", tmp_path / "gates.json")
    given = ["--cases", "C7", "--out", str(tmp_path / "f.json")]
    assert command.bench(ctx, flags(*given, "--write-gates")) == 0
    assert command.bench(ctx, flags(*given)) == 0
    text = gates.PATH.read_text()
    gates.PATH.write_text(text.replace("100", "90"))

    assert command.bench(ctx, flags(*given)) == 1

    assert "ops is 100, the gate says 90" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cases", "C99"], "no case 'C99'"),
        (["--cases", "C1", "--peers", "P99"], "no peer 'P99'"),
        (["--cases", "C1", "--repeats", "0"], "at least one is needed"),
    ],
)
def test_a_wrong_flag_is_named(ctx: Any, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.bench(ctx, flags(*argv))

"""The table that `compare` prints, and its flags."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from shared.app.compare import Comparison, Row
from shared.app.format_order import Finding
from shared.cli.compare import add_arguments, compare, table
from shared.quant.errors import UserError


def result(rows: list[Row], lora: str = "") -> Comparison:
    return Comparison(
        preset="small", device="a CPU", dtype="float32", prompts=["a", "b"], settings={}, lora=lora, rows=rows,
        sheet=Path("out/sheet.png"), report=Path("out/report.json"),
    )  # fmt: skip


REFERENCE = Row(name="bf16", file="f", bytes=22_427_200, seconds=1.25, peak_rss_mb=599.3, adherence=0.5)


def test_the_table_lines_up_and_leaves_out_columns_that_nobody_asked_for() -> None:
    other = Row(name="int8", file="g", bytes=15_994_264, psnr=41.26, ssim=0.98765, latent_error=0.0123, adherence=0.25)

    lines = table(result([REFERENCE, other])).splitlines()

    assert [line.split() for line in lines[:3]] == [
        ["format", "size", "peak", "MiB", "s/picture", "PSNR", "dB", "SSIM", "latent", "error", "adherence"],
        ["bf16", "22.4", "MB", "599", "1.25", "equal", "1.0000", "0.0000", "50.0", "%"],
        ["int8", "16.0", "MB", "-", "0.00", "41.3", "0.9877", "0.0123", "25.0", "%"],
    ]
    assert len({len(line) for line in lines[:3]}) == 1
    assert "2 pictures each, small on a CPU in float32" in lines[4]


def test_a_format_without_figures_says_why_below_the_table() -> None:
    broken = Row(name="svdq_int4_r32", file="", bytes=0, problem="rows in multiples of 128 are needed.")

    text = table(result([REFERENCE, broken], lora="style:1"))

    assert "LoRA r" in text
    assert "svdq_int4_r32: rows in multiples of 128 are needed." in text.splitlines()


@pytest.mark.parametrize(("formats", "code"), [("svdq_int4_r32", 1), ("all", 0)])
def test_a_format_that_was_named_and_failed_is_an_exit_code(
    formats: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Row(name="svdq_int4_r32", file="", bytes=0, problem="no.")
    monkeypatch.setattr("shared.app.compare.compare", lambda *_: result([REFERENCE, broken]))
    parser = argparse.ArgumentParser()
    parser.add_argument("--verbose", type=int, default=0)
    add_arguments(parser)

    assert compare(None, parser.parse_args(["--output", "o", "--formats", formats])) == code  # type: ignore[arg-type]
    assert "svdq_int4_r32: no." in capsys.readouterr().out


def test_an_expectation_that_does_not_hold_stands_out_below_the_table() -> None:
    order = [Finding("8 bits are good", True, "int8 0.01"), Finding("4 bits are fair", False, "q4_0 0.5")]

    lines = table(replace(result([REFERENCE]), order=order)).splitlines()

    assert lines[3:5] == ["holds   8 bits are good: int8 0.01", "BROKEN  4 bits are fair: q4_0 0.5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--prompts", "nothing.txt"], "cannot be read"), (["--prompts", "empty.txt"], "no prompt"),
     (["--count", "0"], "at least one picture"), (["--jobs", "0"], "at least one model"),
     (["--lora-count", "3"], "drawn with --lora as well")],
)  # fmt: skip
def test_a_wrong_flag_is_named(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("# only a note\n\n")
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    with pytest.raises(UserError, match=message):
        compare(None, parser.parse_args(["--output", "o", *arguments]))  # type: ignore[arg-type]

"""The whole program as a child process: what is kept of its answer, and of its failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.bench.programs import program_cases
from shared.bench.stand import Stand

PROGRAM = """\
import json, sys
words = [word for word in sys.argv[3:] if word != "--json"]
given = dict(zip(words[::2], words[1::2]))
assert sys.argv[1] == "generate"
if given["--preset"] == "broken":
    sys.exit("No such weights.")
if given.get("--max-vram") == "2GB":
    sys.exit("Does not fit into 2 GB.")
print("noise of a library")
print(json.dumps({"seconds": {"text": 0.5, "denoise": 1.0}, "forwards": 2, "peak_rss_mb": 123.4, "peak_vram_mb": 0.0}))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "wgp.py").write_text(PROGRAM)
    return tmp_path


def test_time_and_memory_are_what_the_program_tells(stand: Stand, root: Path) -> None:
    program_cases(root, ["some"])["C4"](stand)

    (row,) = stand.rows
    assert (row.row, row.who) == ("some, 256x256, 2 forwards", "ours")
    assert row.values["denoise_seconds"] == 1.0
    assert row.values["forwards"] == 2
    assert row.values["peak_rss_mb"] == 123.4
    assert "peak_vram_mb" not in row.values, "nothing was on a GPU"
    assert row.values["rest_seconds"] == pytest.approx(float(row.values["wall_seconds"]) - 1.5, abs=0.011)
    assert "fresh process" in stand.how


def test_a_cap_that_is_too_small_is_a_note_and_the_others_go_on(stand: Stand, root: Path) -> None:
    program_cases(root, ["some"])["B5"](stand)

    assert [row.row for row in stand.rows][:2] == ["some, no cap", "some, 24 GB"]
    assert stand.notes == ["some, 2 GB: not drawn (Does not fit into 2 GB.)."]


def test_a_preset_without_weights_does_not_stop_the_next(stand: Stand, root: Path) -> None:
    program_cases(root, ["broken", "some"])["B6"](stand)

    assert [row.row for row in stand.rows] == ["some, 1024x1024"]
    assert stand.notes == ["broken, 1024x1024: not drawn (No such weights.)."]

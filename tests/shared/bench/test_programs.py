"""The whole program as a child process: what is kept of its answer, and of its failure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shared.bench.programs import program_cases
from shared.bench.stand import Stand

PROGRAM = """\
import json, os, sys
words = [word for word in sys.argv[3:] if word != "--json"]
given = dict(zip(words[::2], words[1::2]))
assert sys.argv[1] == "generate"
if given["--preset"] == "broken":
    sys.exit("No such weights.")
if given.get("--max-vram") == "2GB":
    sys.exit("Does not fit into 2 GB.")
for _ in range(60_000 * int(given["--steps"])):
    hash(os.getpid())
print("noise of a library")
print(json.dumps({
    "seconds": {"text": 0.5, "denoise": 1.0, "total": 9.0}, "forwards": int(given["--steps"]), "peak_rss_mb": 123.4,
    "peak_vram_mb": 0.0, "ckpts": given.get("--ckpts"), "threads": os.environ.get("OMP_NUM_THREADS"),
}))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "wgp.py").write_text(PROGRAM)
    return tmp_path


def test_time_and_memory_are_what_the_program_tells(stand: Stand, root: Path) -> None:
    program_cases(root, ["some"])["C4"](stand)

    few, whole = stand.rows
    assert [(row.row, row.who) for row in stand.rows] == [
        ("some, 256x256, 2 forwards", "ours"), ("some, 256x256, 8 forwards", "ours"),
    ]  # fmt: skip
    assert few.values["denoise_seconds"] == 1.0
    assert (few.values["forwards"], whole.values["forwards"]) == (2, 8)
    assert few.values["peak_rss_mb"] == 123.4
    assert "peak_vram_mb" not in few.values, "nothing was on a GPU"
    assert few.values["rest_seconds"] == pytest.approx(float(few.values["wall_seconds"]) - 1.5, abs=0.011)
    assert "fresh process" in stand.how


def test_the_time_of_forwards_is_what_more_of_them_take_longer(stand: Stand, root: Path) -> None:
    program_cases(root, ["some"])["C4"](stand)

    few, whole = (row.values for row in stand.rows)
    longer = float(whole["cpu_seconds"]) - float(few["cpu_seconds"])
    assert longer > 0
    assert float(whole["forwards_cpu_seconds"]) == pytest.approx(longer * 8 / 6, abs=0.02)
    assert float(few["forwards_cpu_seconds"]) == pytest.approx(longer * 2 / 6, abs=0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's account of memory")
def test_memory_of_the_programs_own_is_watched_from_outside(stand: Stand, root: Path) -> None:
    (root / "wgp.py").write_text("import time\nheld = b'x' * 2**26\ntime.sleep(0.2)\n" + PROGRAM)

    program_cases(root, ["some"])["C4"](stand)

    assert 64 < float(stand.rows[0].values["peak_own_mb"]) < 128


def test_the_program_is_given_the_folders_of_models(stand: Stand, root: Path) -> None:
    (root / "wgp.py").write_text(PROGRAM.replace('if given["--preset"]', 'if given["--ckpts"] != "models"'))

    program_cases(root, ["some"], ["--ckpts", "models"])["C4"](stand)

    assert len(stand.rows) == 2 and not stand.notes


def test_a_cap_that_is_too_small_is_a_note_and_the_others_go_on(stand: Stand, root: Path) -> None:
    stand.peers = frozenset({"P6"})

    program_cases(root, ["some"])["B5"](stand)

    first = [(row.row, row.who) for row in stand.rows][:4]
    assert first == [("some, no cap", "ours"), *(("some, 24 GB", who) for who in ("ours", "ours streamed", "P6"))]
    whose = ("", ", ours streamed", ", P6")
    assert stand.notes == [f"some, 2 GB{who}: not drawn (Does not fit into 2 GB.)." for who in whose]


def test_mmgp_is_left_out_where_no_peer_is_asked_for(stand: Stand, root: Path) -> None:
    program_cases(root, ["some"])["B5"](stand)

    assert {row.who for row in stand.rows} == {"ours", "ours streamed"}


def test_a_preset_without_weights_does_not_stop_the_next(stand: Stand, root: Path) -> None:
    program_cases(root, ["broken", "some"])["B6"](stand)

    assert [row.row for row in stand.rows] == ["some, 1024x1024"]
    assert stand.notes == ["broken, 1024x1024: not drawn (No such weights.)."]

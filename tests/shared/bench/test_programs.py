"""The whole program as a child process: what is kept of its answer, and of its failure."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shared.bench import programs
from shared.bench.programs import PeerProgram, program_cases
from shared.bench.stand import Stand

PROGRAM = """\
import json, os, sys
words = [word for word in sys.argv[3:] if word not in ("--json", "--dry-run")]
given = dict(zip(words[::2], words[1::2]))
assert sys.argv[1] == "generate"
cap = float((given.get("--max-vram") or "0MB").removesuffix("MB")) * 2**20 / 1e9
if "--dry-run" in sys.argv:
    roles = ("transformer", "text_encoder", "vae")
    print(json.dumps({
        "files": [{"role": role, "path": os.path.abspath(f"{role}.safetensors")} for role in (*roles, "companion")],
        "memory": {"weights_mb": {"transformer": 1000.0}, "budget_mb": 500.0, "vram_mb": 700.0, "engine": "stream"},
    }))
    sys.exit()
if given["--preset"] == "broken":
    sys.exit("No such weights.")
if 0 < cap < 2.1 and given.get("--profile") == "1":
    sys.exit("Does not fit into 2 GB.\\n--verbose 2 shows where.")
for _ in range(60_000 * int(given["--steps"])):
    hash(os.getpid())
print("noise of a library")
print(json.dumps({
    "seconds": {"text": 0.5, "denoise": 1.0, "total": 9.0}, "forwards": int(given["--steps"]), "peak_rss_mb": 123.4,
    "peak_vram_mb": 0.0, "ckpts": given.get("--ckpts"), "threads": os.environ.get("OMP_NUM_THREADS"),
}))
"""

# Draws as the peer does: everything on the GPU takes 12 GB.
PEER = """\
import json, sys
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert "--companion" not in given
assert all(given[f"--{role}"].endswith(".safetensors") for role in ("transformer", "text-encoder", "vae"))
if sys.argv[1] == "whole" and 0 < float(given["--cap"]) < 12:
    sys.exit("torch.OutOfMemoryError: CUDA out of memory.\\nat shutdown: something else")
if sys.argv[1] == "strange":
    sys.exit("ValueError: no packed weights")
print(json.dumps({"seconds": {"load": 2.0, "denoise": 3.0}, "forwards": 8, "peak_vram_mb": 1000.0}))
"""
PEER_PROGRAM = PeerProgram(module="a_peer", whole="whole", offloading=("by model", "whole"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "wgp.py").write_text(PROGRAM)
    (tmp_path / "a_peer.py").write_text(PEER)
    for role in ("transformer", "text_encoder", "vae"):
        (tmp_path / f"{role}.safetensors").write_bytes(b"weights")
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


def test_a_cap_that_is_too_small_is_a_row_that_says_so_and_the_others_go_on(stand: Stand, root: Path) -> None:
    stand.peers = frozenset({"P6"})

    program_cases(root, ["some"], caps=[2.0])["B5"](stand)

    capped = {row.who: row.values for row in stand.rows if row.row == "some, 2 GB"}
    assert list(capped) == ["ours", "ours streamed", "P6 profile 1", "P6 profile 4", "P6 profile 5"]
    assert capped["P6 profile 1"] == {"outcome": "Does not fit into 2 GB."}
    assert capped["P6 profile 5"]["denoise_seconds"] == 1.0
    assert stand.notes == ["some, 2 GB, P6 profile 1: not drawn (Does not fit into 2 GB.)."]


def test_a_capped_row_tells_the_weights_and_their_room(stand: Stand, root: Path) -> None:
    program_cases(root, ["some"], caps=[2.0])["B5"](stand)

    values = next(row.values for row in stand.rows if row.row == "some, 2 GB")
    assert values["weights_gb"] == pytest.approx(1000 * 2**20 / 1e9, abs=1e-3)
    assert values["room_gb"] == pytest.approx(500 * 2**20 / 1e9, abs=1e-3)
    assert (values["engine"], values["predicted_vram_mb"]) == ("stream", 700.0)


def test_the_first_caps_of_all_models_come_before_the_second(stand: Stand, root: Path) -> None:
    program_cases(root, ["a", "b"], caps=[6.0, 1.5])["B5"](stand)

    rows = list(dict.fromkeys(row.row for row in stand.rows))
    assert rows == [
        "a, no cap", "b, no cap", "a, 6 GB", "b, 6 GB", "a, 1.5 GB", "a, 2048x2048, 1.9 GB", "b, 1.5 GB",
        "b, 2048x2048, 1.9 GB",
    ]  # fmt: skip


def test_the_peer_draws_from_the_same_files_in_each_way_of_offloading(stand: Stand, root: Path) -> None:
    stand.peers = frozenset({"P5"})

    program_cases(root, ["some"], caps=[8.0, 24.0], peer=PEER_PROGRAM)["B5"](stand)

    theirs = {(row.row, row.who): row.values for row in stand.rows if row.who.startswith("P")}
    assert set(theirs) == {(f"some, {cap} GB", f"P5 {way}") for cap in (8, 24) for way in ("by model", "whole")}
    assert theirs["some, 8 GB", "P5 whole"] == {"outcome": "out of memory"}
    assert theirs["some, 24 GB", "P5 whole"]["peak_vram_mb"] == 1000.0
    assert theirs["some, 24 GB", "P5 whole"]["stages_seconds"] == 5.0


def test_a_peer_that_cannot_read_a_model_is_not_asked_again(stand: Stand, root: Path) -> None:
    stand.peers = frozenset({"P5"})
    strange = replace(PEER_PROGRAM, offloading=("strange", "by model"))

    program_cases(root, ["some"], caps=[8.0, 24.0], peer=strange)["B5"](stand)

    theirs = [(row.row, row.who, row.values) for row in stand.rows if row.who.startswith("P")]
    assert theirs == [("some, 8 GB", "P5 strange", {"outcome": "ValueError: no packed weights"})]


def test_peers_are_left_out_where_none_is_asked_for(stand: Stand, root: Path) -> None:
    stand.peers = frozenset()

    program_cases(root, ["some"], caps=[2.0], peer=PEER_PROGRAM)["B5"](stand)

    assert {row.who for row in stand.rows} == {"ours", "ours streamed"}


def test_a_cold_start_is_measured_with_files_in_memory_and_on_disk_beside_the_peer(
    stand: Stand, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(programs, "forget_file", lambda path: forgotten.append(path.name))
    (root / "shared" / "bench").mkdir(parents=True)
    (root / "shared" / "bench" / "one_session.py").write_text(
        "import json, sys\nassert sys.argv[1:4] == ['some,other', '1024x1024', '8']\n"
        "print(json.dumps([{'preset': p, 'picture': n, 'wall_seconds': 1.0, 'seconds': {'load': 0.5, 'total': 1.0},"
        " 'forwards': 8, 'peak_rss_mb': 5.0, 'peak_vram_mb': None} for p in ('some', 'other') for n in (1, 2)]))\n"
    )

    program_cases(root, ["some", "other"], peer=PEER_PROGRAM)["B6"](stand)

    rows = [(row.row, row.who) for row in stand.rows]
    assert rows[:4] == [
        ("some, 1024x1024", "ours"), ("some, 1024x1024", "P1"), ("some, 1024x1024, files not in memory", "ours"),
        ("some, 2048x2048", "ours"),
    ]  # fmt: skip
    assert forgotten[:3] == [f"{role}.safetensors" for role in ("transformer", "text_encoder", "vae")]
    assert [row for row, _ in rows[8:]] == [
        "one process: some, first picture", "one process: some, second picture", "one process: other, after some",
        "one process: other, second picture", "one process",
    ]  # fmt: skip
    assert stand.rows[8].values == {"wall_seconds": 1.0, "load_seconds": 0.5, "peak_rss_mb": 5.0, "forwards": 8}


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be told to forget a file")
def test_a_forgotten_file_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"weights")

    programs.forget_file(tmp_path / "file")

    assert (tmp_path / "file").read_bytes() == b"weights"


def test_a_preset_without_weights_does_not_stop_the_next(stand: Stand, root: Path) -> None:
    program_cases(root, ["broken", "some"])["C4"](stand)

    rows = {row.row: row.values for row in stand.rows}
    assert rows["broken, 256x256, 2 forwards"] == {"outcome": "No such weights."}
    assert rows["some, 256x256, 8 forwards"]["forwards"] == 8
    assert stand.notes[0] == "broken, 256x256, 2 forwards: not drawn (No such weights.)."

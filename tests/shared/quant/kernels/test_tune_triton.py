"""Measuring replaces the entries of one generation by what was fastest there, and says with what."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from shared.ops import tuning
from shared.ops.rounding import Kind
from shared.quant.kernels import tune_triton
from shared.quant.kernels.tune_triton import candidates, tuned

DOCUMENT = json.loads(tuning.FILE.read_text(encoding="utf-8"))
WINNER = {"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3, "GROUP_M": 8}


def measure(kind: Kind, tokens: int, options: tuning.Launch) -> float:
    if kind == "fp8" or options["BLOCK_M"] == 256:
        raise RuntimeError("no such units, or out of shared memory")
    return tokens * (0.5 if options == WINNER else 1.0)


def test_the_fastest_of_each_size_is_written_for_this_generation_alone() -> None:
    before = copy.deepcopy(DOCUMENT)

    result = tuned(DOCUMENT, 89, "a card, torch 2.13", measure)

    assert before == DOCUMENT
    mine, others = result["architectures"].pop("89"), result["architectures"]
    bounds = [bound for bound, _ in before["architectures"]["89"]["int8 matmul"]]
    assert mine["int8 matmul"] == [[bound, WINNER] for bound in bounds]
    assert mine["fp8 matmul"] == before["architectures"]["89"]["fp8 matmul"]  # nothing ran: left as it was
    assert mine["row"] == before["architectures"]["89"]["row"]
    assert others == {name: entry for name, entry in before["architectures"].items() if name != "89"}
    assert result["measured"] == {"89": "a card, torch 2.13"}


def test_a_generation_that_is_not_listed_gets_an_entry() -> None:
    result = tuned(DOCUMENT, 110, "a new card", measure)

    assert result["architectures"]["110"]["int8 matmul"][-1] == [None, WINNER]
    assert tuning.launch("int8 matmul", 110, 4224, result["architectures"]) == WINNER


def test_candidates_differ_and_hold_the_winner_of_this_test() -> None:
    found = candidates()

    assert WINNER in found
    assert len({tuple(sorted(options.items())) for options in found}) == len(found)


def test_without_a_gpu_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")

    assert tune_triton.main(["--out", str(tmp_path / "t.json")]) == 1
    assert "there is no NVIDIA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""`inspect`: one file in full, several in a line each, and which exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import save_file

import models
from shared.app.families import load_families
from shared.cli.inspection_report import inspect
from shared.cli.parser import build_parser, parse_arguments
from shared.quant.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain file, one of GGUF blocks, and one that is broken."""
    save_file({"some.weight": torch.zeros(64, 64)}, tmp_path / "plain.safetensors")
    writer = GGUFWriter(tmp_path / "packed.gguf", "lumina2")
    blocks = quants.quantize(torch.ones(64, 64).numpy(), GGMLQuantizationType.Q8_0)
    writer.add_tensor("some.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    return tmp_path


def run(*arguments: str | Path) -> int:
    families = load_families(Path(models.__path__[0]))
    parsed = parse_arguments(build_parser(families, "lora_root"), ["inspect", *map(str, arguments)])
    return inspect(parsed, families)


def test_one_file_is_told_in_full_and_its_formats_as_they_are_spelt(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(folder / "packed.gguf")

    told = capsys.readouterr().out.splitlines()
    assert code == 0
    assert told[0] == str(folder / "packed.gguf")
    assert "  tensors: 1" in told and "    GGUF_Q8_0: 1" in told


def test_several_files_get_a_line_each_and_a_broken_one_does_not_hide_the_rest(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(folder / "plain.safetensors", folder / "broken.safetensors", folder / "packed.gguf")

    plain, broken, *hint, packed = capsys.readouterr().out.splitlines()
    assert code == 1, "a file that was named is no checkpoint"
    assert plain.endswith("1 F32") and packed.endswith("1 GGUF_Q8_0")
    assert broken.startswith(str(folder / "broken.safetensors")) and broken.count("broken.safetensors") == 1
    assert all(line.startswith("  ") for line in hint)


def test_a_folder_is_a_list_and_its_broken_files_are_no_failure(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")]) == 3

    run(folder, "--json")
    told: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [description["kind"] for description in told] == ["unreadable", "other", "other"]


def test_one_broken_file_is_an_error_and_json_of_one_is_an_object(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
        run(folder / "broken.safetensors")

    run(folder / "plain.safetensors", "--json")
    assert json.loads(capsys.readouterr().out)["tensors"] == 1


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.gguf and no \.safetensors and no \.sft file"):
        run(tmp_path)

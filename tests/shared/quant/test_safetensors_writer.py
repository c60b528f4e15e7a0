"""A file written group by group is the file that holds all of them, or there is none."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import RunError
from shared.quant.safetensors_writer import SafetensorsWriter

State = dict[str, torch.Tensor]
METADATA = {"what": "a test"}


def groups() -> dict[str, State]:
    """Layers with markers of odd lengths and scalars between the large tensors, which would misalign those after."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer{i}": {
            f"layer{i}.marker": torch.arange(5 + i, dtype=torch.uint8),
            f"layer{i}.scale": torch.tensor(1.5 + i),
            f"layer{i}.half": torch.tensor(0.5, dtype=torch.bfloat16),
            f"layer{i}.weight": torch.randn(8, 12, generator=generator),
            f"layer{i}.codes": torch.randn(8, 12, generator=generator).to(torch.float8_e4m3fn),
        }
        for i in range(3)
    }


def writer(path: Path, found: Mapping[str, State], job: object = "job") -> SafetensorsWriter:
    names = [name for state in found.values() for name in state]
    return SafetensorsWriter(path, names=len(names), name_bytes=len("".join(names)), metadata=METADATA, job=job)


def write(path: Path, found: Mapping[str, State], job: object = "job") -> list[str]:
    """Write what is not finished yet; returns the groups that were."""
    with writer(path, found, job) as opened:
        finished = list(opened.finished)
        for group, state in found.items():
            if group not in opened.finished:
                opened.add(group, state, f"note of {group}")
        opened.finish()
        assert opened.finished == {group: f"note of {group}" for group in found}
    return finished


def interrupt(path: Path, found: Mapping[str, State], after: int) -> None:
    with pytest.raises(KeyboardInterrupt), writer(path, found) as opened:  # noqa: PT012
        for group in list(found)[:after]:
            opened.add(group, found[group], f"note of {group}")
        raise KeyboardInterrupt


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_holds_every_tensor_for_the_safetensors_library(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.safetensors"
    write(path, groups())

    expected = {name: tensor for state in groups().values() for name, tensor in state.items()}
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == set(expected)
        assert opened.metadata() == METADATA
        for name, tensor in expected.items():
            found = opened.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found.float(), tensor.float())
    assert files_in(path.parent) == ["out.safetensors"]


def test_entries_stand_in_the_order_of_their_data_without_gaps_and_aligned(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    write(path, groups())

    end = path.stat().st_size - sum(t.nbytes for t in Checkpoint.open(path).tensors.values())
    assert end % 8 == 0
    for info in Checkpoint.open(path).tensors.values():
        assert info.offset == end, info.name
        width = {"F32": 4, "BF16": 2}.get(info.dtype, 1)
        assert info.offset % width == 0, info.name
        end += info.nbytes


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_an_interrupted_run_is_gone_on_with_to_the_same_bytes(tmp_path: Path, after: int) -> None:
    whole, path = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    write(whole, groups())
    interrupt(path, groups(), after)
    assert not path.exists()
    with path.with_name("resumed.safetensors.part").open("ab") as part:
        part.write(b"half a tensor")

    assert write(path, groups()) == list(groups())[:after]

    assert path.read_bytes() == whole.read_bytes()
    assert files_in(tmp_path) == ["resumed.safetensors", "whole.safetensors"]


def test_another_job_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    interrupt(path, groups(), 2)

    assert write(path, groups(), job="another") == []


@pytest.mark.parametrize("damage", ["part", "journal", "cut journal", "short part"])
def test_what_a_power_cut_damaged_is_written_again(tmp_path: Path, damage: str) -> None:
    whole, path = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    write(whole, groups())
    interrupt(path, groups(), 2)
    part, journal = (path.with_name(f"{path.name}.{s}") for s in ("part", "part.journal"))
    if damage == "part":
        part.write_bytes(part.read_bytes()[:-4] + b"\0\0\0\0")
    elif damage == "short part":
        part.write_bytes(part.read_bytes()[:-4])
    elif damage == "journal":
        journal.write_bytes(b"\0" * 100)
    else:
        journal.write_bytes(journal.read_bytes()[:-10])

    assert write(path, groups()) == ([] if damage == "journal" else ["layer0"])

    assert path.read_bytes() == whole.read_bytes()


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Writes beyond it fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0.1, 0.9, 1.0])
def test_a_full_disk_leaves_nothing(tmp_path: Path, room: float) -> None:
    """room: share of the file that fits, less a byte: the header's, a layer's and the very last are refused."""
    path = tmp_path / "out.safetensors"
    write(path, groups())
    size = path.stat().st_size
    path.unlink()
    with (
        no_file_larger_than(int(room * size) - 1),
        pytest.raises(RunError, match=r"out\.safetensors could not be written: File too large"),
    ):
        write(path, groups())

    assert files_in(tmp_path) == []


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), writer(path, groups()) as opened:  # noqa: PT012
        opened.add("layer0", groups()["layer0"])
        raise RuntimeError

    assert path.read_bytes() == b"old"
    assert files_in(tmp_path) == ["out.safetensors"]


def test_room_that_does_not_suffice_is_told(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    with (  # noqa: PT012
        pytest.raises(ValueError, match="are reserved"),
        SafetensorsWriter(path, names=1, name_bytes=3, metadata={}, job=0) as opened,
    ):
        opened.add("layer0", groups()["layer0"])
        opened.finish()

    assert files_in(tmp_path) == []


def test_the_journal_is_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    interrupt(path, groups(), 1)

    first, second = map(json.loads, path.with_name("out.safetensors.part.journal").read_text().splitlines())
    assert first["job"] == "job"
    assert second["group"] == "layer0"

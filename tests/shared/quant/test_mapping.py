"""Tensors that lie in a file: private, let go of and read again."""

from __future__ import annotations

import gc
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

from shared.quant import mapping
from shared.quant.mapping import forget, is_mapped, map_bytes

SIZE = 64 * mmap.PAGESIZE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(SIZE))
    return path


def resident_kib(tensor: torch.Tensor) -> int:
    """How much of the mapping that a tensor lies in is in memory: Linux's own account of it."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            found = begin <= tensor.data_ptr() < end
        elif found and first == "Rss:":
            return int(rest[0])
    raise AssertionError("no such mapping")


def test_tensors_are_the_files_bytes_and_writing_to_one_changes_nothing_else(file: Path) -> None:
    before = file.read_bytes()

    tensor = map_bytes(file, 5000, 9000)
    read = bytes(tensor.numpy())
    tensor.zero_()

    assert read == before[5000:14000]
    assert file.read_bytes() == before
    assert bytes(map_bytes(file, 5000, 9000).numpy()) == read


def test_the_mapping_lives_as_long_as_a_tensor_or_a_view_of_it(file: Path) -> None:
    tensor = map_bytes(file, 100, 4000)
    view = tensor.view(torch.int32)[10:20]
    copy = view.clone()
    living = len(mapping._living)

    del tensor
    gc.collect()

    assert is_mapped(view) and not is_mapped(copy)
    assert len(mapping._living) == living
    del view
    gc.collect()
    assert len(mapping._living) == living - 1


def test_bytes_behind_the_end_are_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="ends before byte 262,145"):
        map_bytes(file, SIZE - 10, 11)

    assert map_bytes(file, SIZE, 0).numel() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_no_file_stays_open_for_a_tensor_of_it(file: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = len(os.listdir("/dev/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files + 8, before[1]))
        tensors = [map_bytes(file, 10 * i, 10) for i in range(100)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    assert bytes(torch.cat(tensors).numpy()) == file.read_bytes()[:1000]


@pytest.mark.skipif(sys.platform == "win32", reason="is asked by Python's own mmap")
def test_what_the_system_refuses_names_the_file(file: Path) -> None:
    with pytest.raises(OSError, match=r"\[Errno 9\].*weights"):
        mapping._map(file, -1, 0, 10)  # no such descriptor


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory")
def test_opening_reads_nothing_and_what_is_forgotten_is_read_again(file: Path) -> None:
    tensor = map_bytes(file, 0, SIZE)
    opened = resident_kib(tensor)
    total = int(tensor.sum())
    used = resident_kib(tensor)

    forgotten = forget([tensor[16:32], torch.zeros(5)])

    assert (opened, used, resident_kib(tensor), forgotten) == (0, SIZE // 1024, 0, SIZE)
    assert int(tensor.sum()) == total


def test_memory_that_is_no_file_is_never_let_go_of() -> None:
    tensor = torch.arange(10000)

    assert forget([tensor, torch.empty(3, device="meta")]) == 0
    assert int(tensor[-1]) == 9999

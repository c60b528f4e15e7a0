"""Tensors that lie in a file: their bytes are read from disk when they are first touched, and can be let go of again.

Such tensors are the system's page cache, not memory of the program: opening 12 GB takes milliseconds, what is not used
is not read, and when memory gets short the system drops pages and reads them again later. Each tensor has pages of its
own, which are private: writing to it changes neither the file nor what others read from it.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from torch import Tensor

# linux/mman.h on x86 and ARM; the mmap module has the name from Python 3.13 on. Private pages could be written to, so
# Linux counts them against its memory, and may refuse to map more than it has, unless it is told that nobody will.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class _Mapping(mmap.mmap):
    """The pages that hold some bytes of a file. Unlike mmap itself, it can be referred to weakly on every platform."""


# By the address of the first byte asked for. What the system maps, it maps for the whole process, and so this table is
# the process's too.
_living: WeakValueDictionary[int, _Mapping] = WeakValueDictionary()


def map_bytes(file: Path, offset: int, nbytes: int) -> Tensor:
    """These bytes of a file, uint8 (nbytes,). Raises ValueError where the file ends before them."""
    import torch

    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = offset + nbytes - begin
    with file.open("rb") as stream:
        if sys.platform == "linux":
            flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            mapping = _Mapping(stream.fileno(), length, flags=flags, prot=protection, offset=begin)
        else:
            mapping = _Mapping(stream.fileno(), length, access=mmap.ACCESS_COPY, offset=begin)
    tensor = torch.frombuffer(mapping, dtype=torch.uint8, offset=offset - begin)  # which keeps the mapping
    _living[tensor.data_ptr()] = mapping
    return tensor


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor, or the one it is a view of, lies in a file."""
    return _mapping_of(tensor) is not None


def forget(tensors: Iterable[Tensor]) -> int:
    """Let go of the memory of those tensors that lie in files; they stay usable, and are read again when used.

    For weights that are done with for now: on a CPU, a text encoder's while the transformer works. Tensors elsewhere
    are left alone, as are all on systems that have no such call. What was written to a mapped tensor is lost. Returns
    the bytes that lie in files.
    """
    forgotten = 0
    for tensor in tensors:
        mapping = _mapping_of(tensor)
        if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)
            forgotten += tensor.untyped_storage().nbytes()
    return forgotten


def _mapping_of(tensor: Tensor) -> _Mapping | None:
    # A view's storage is its whole tensor's.
    return _living.get(tensor.untyped_storage().data_ptr()) if tensor.device.type == "cpu" else None

"""Tensors that lie in a file: their bytes are read from disk when they are first touched, and can be let go of again.

Such tensors are the system's page cache, not memory of the program: opening 12 GB takes milliseconds, what is not used
is not read, and when memory gets short the system drops pages and reads them again later. Each tensor has pages of its
own, which are private: writing to it changes neither the file nor what others read from it.

The C library is asked for the mappings. Python's mmap keeps its file open once more for each: a model of 1,200 tensors
would need more open files than most systems allow a program (1,024 as a rule, a Mac 256), and its `trackfd=False` came
with Python 3.13. Windows has neither such a bound nor such a library, and is asked by Python's mmap.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import finalize

if TYPE_CHECKING:
    from torch import Tensor

_PROTECTION = 1 | 2  # PROT_READ and PROT_WRITE, which the mmap module has not on Windows
_PRIVATE = 2  # MAP_PRIVATE
# linux/mman.h on x86 and ARM; the mmap module has the name from Python 3.13 on. Private pages could be written to, so
# Linux counts them against its memory, and may refuse to map more than it has, unless it is told that nobody will.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0
_FAILED = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1  # MAP_FAILED
_WRITABLE = 0x200  # PyBUF_WRITE


class _Pages(NamedTuple):
    """Where some bytes of a file lie."""

    address: int
    nbytes: int


# By the address of the first byte asked for. What the system maps, it maps for the whole process, and so this table is
# the process's too.
_living: dict[int, _Pages] = {}


def map_bytes(file: Path, offset: int, nbytes: int) -> Tensor:
    """These bytes of a file, uint8 (nbytes,). Raises ValueError where the file ends before them, OSError as the system
    does."""
    with opened(file) as source:
        return source.map(offset, nbytes)


@contextmanager
def opened(file: Path) -> Iterator[OpenFile]:
    """A file several of whose tensors are wanted. Raises OSError as the system does."""
    # A stream would take longer than a mapping, and a checkpoint has thousands.
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        yield OpenFile(file, descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class OpenFile:
    """What may be mapped as long as it is open; what was mapped outlives that."""

    path: Path
    descriptor: int
    nbytes: int

    def map(self, offset: int, nbytes: int) -> Tensor:
        """See map_bytes()."""
        import torch

        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        if self.nbytes < offset + nbytes:
            raise ValueError(f"{self.path} ends before byte {offset + nbytes:,}.")
        begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = offset + nbytes - begin
        if sys.platform == "win32":
            pages: Any = mmap.mmap(self.descriptor, length, access=mmap.ACCESS_COPY, offset=begin)
        else:
            pages = _map(self.path, self.descriptor, begin, length)
        tensor = torch.frombuffer(pages, dtype=torch.uint8, offset=offset - begin)  # which keeps the pages
        start = tensor.data_ptr()
        _living[start] = _Pages(start - (offset - begin), length)
        finalize(pages, _let_go, start).atexit = False  # whoever still reads them then shall be able to
        return tensor


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor, or the one it is a view of, lies in a file."""
    return _pages_of(tensor) is not None


def forget(tensors: Iterable[Tensor]) -> int:
    """Let go of the memory of those tensors that lie in files; they stay usable, and are read again when used.

    For weights that are done with for now: on a CPU, a text encoder's while the transformer works. Tensors elsewhere
    are left alone, as are all on systems that have no such call. What was written to a mapped tensor is lost. Returns
    the bytes that lie in files.
    """
    forgotten = 0
    for tensor in tensors:
        pages = _pages_of(tensor)
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            _library().madvise(pages.address, pages.nbytes, mmap.MADV_DONTNEED)
            forgotten += tensor.untyped_storage().nbytes()
    return forgotten


def _pages_of(tensor: Tensor) -> _Pages | None:
    # A view's storage is its whole tensor's.
    return _living.get(tensor.untyped_storage().data_ptr()) if tensor.device.type == "cpu" else None


def _map(file: Path, descriptor: int, begin: int, length: int) -> memoryview:
    """The pages of a file from `begin`, a multiple of theirs, as long as somebody has the result."""
    library = _library()
    address = library.mmap(None, length, _PROTECTION, _PRIVATE | _NORESERVE, descriptor, begin)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(file))
    pages: memoryview = _view()(address, length, _WRITABLE)
    return pages


def _let_go(start: int) -> None:
    """Of the pages that hold the byte at this address, which nobody has any more."""
    pages = _living.pop(start)
    if sys.platform != "win32":  # there Python does it
        _library().munmap(pages.address, pages.nbytes)


@cache
def _library() -> ctypes.CDLL:
    """The C library, its mmap, munmap and madvise told what they take."""
    library = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.restype = address
    library.mmap.argtypes = [address, size, number, number, number, ctypes.c_int64]
    library.munmap.argtypes = [address, size]
    library.madvise.argtypes = [address, size, number]
    return library


@cache
def _view() -> Any:
    """Python's way to look at memory that is not its own: (address, bytes, flags) -> memoryview."""
    view = ctypes.pythonapi.PyMemoryView_FromMemory
    view.restype = ctypes.py_object
    view.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
    return view

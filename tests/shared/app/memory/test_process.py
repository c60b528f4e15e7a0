"""Peaks are this process's own, and what is freed is the system's again."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from shared.app.memory import MIB, peak_rss_mb

PROGRAM = Path(__file__).parents[4]


def test_the_peak_is_not_inherited_from_the_process_that_started_this_one() -> None:
    ballast = bytearray(300 * MIB)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from shared.app.memory import peak_rss_mb; print(peak_rss_mb())"

    child = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM, capture_output=True, text=True, check=True)

    assert float(child.stdout) < 200 < (peak_rss_mb() or 0)


ALLOCATE = """
import ctypes
from shared.app.memory import give_freed_memory_back

class Figures(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks pieces bytes a b c d e".split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo2.restype = Figures
give_freed_memory_back()
libc.free(libc.malloc(30 << 20))  # from which glibc would learn
before = libc.mallinfo2().pieces
libc.malloc(20 << 20)
print(libc.mallinfo2().pieces - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc 2.33"
)
def test_large_pieces_of_ram_are_the_systems_again_when_they_are_freed() -> None:
    done = subprocess.run([sys.executable, "-c", ALLOCATE], cwd=PROGRAM, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "1"

"""What this process holds of RAM and GPU memory, what it could have, and what the C library keeps."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from shared.app.memory.sizes import MIB

# Python, torch, diffusers, transformers and numba in use, nothing loaded; measured on Linux x86-64, CPU build.
BASE_MB = 644.0

# glibc's malloc.h: M_MMAP_THRESHOLD, from which a piece is taken from the system; M_TRIM_THRESHOLD, from which free
# memory at the heap's end is given back. Lower ones cost time: the system clears every page that it hands out.
_HEAP_LIMITS = {-3: 4 * MIB, -1: 16 * MIB}


def peak_rss_mb() -> float | None:
    """Most physical memory this process has held so far, MiB; None where the system does not tell."""
    if sys.platform == "win32":
        try:
            import psutil
        except ImportError:
            return None
        return float(psutil.Process().memory_info().peak_wset) / MIB
    if sys.platform == "linux":
        # Not getrusage: on Linux its maximum survives exec, so a child reports the peak of the process that started it.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024  # KiB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB  # bytes on macOS


def free_vram_bytes() -> int | None:
    """Bytes that this process can have on the first GPU, what its tensors hold now among them; None if not known."""
    torch = _torch_with_cuda()
    if torch is None:
        return None
    return int(torch.cuda.mem_get_info(0)[0]) + int(torch.cuda.memory_reserved(0))


def free_ram_bytes() -> int | None:
    """Bytes of RAM that can be had without swapping, this process's own among them; None if the system does not say."""
    listing = Path("/proc/meminfo")
    if not listing.is_file():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", listing.read_text(encoding="ascii", errors="replace"))
    own = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii", errors="replace"))
    return None if found is None else (int(found[1]) + (int(own[1]) if own else 0)) * 1024


def give_freed_memory_back() -> None:
    """From now on, let large pieces of RAM go back to the system when they are freed; does nothing without glibc.

    glibc takes large pieces from the system one by one, until one is freed: then it takes pieces of that size, up to
    32 MiB, out of its heap, which keeps whatever lies below a piece in use. A decode in tiles so held 340 MiB of RAM
    for tensors of 160. A fixed limit ends that. To be called early: what the heap has grown to is used again first.
    """
    if sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if mallopt is not None:
        for option, size in _HEAP_LIMITS.items():
            mallopt(option, size)


def reset_peak_vram() -> None:
    """Start a new peak measurement on every GPU."""
    torch = _torch_with_cuda()
    if torch is not None:
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def peak_vram_mb() -> float:
    """Most GPU memory held by tensors since the last reset, MiB, of the fullest GPU; 0 without CUDA."""
    torch = _torch_with_cuda()
    if torch is None:
        return 0.0
    peaks = [int(torch.cuda.max_memory_allocated(index)) for index in range(torch.cuda.device_count())]
    return max(peaks) / MIB


def _torch_with_cuda() -> Any | None:
    torch = sys.modules.get("torch")  # not imported: then nothing is on a GPU either
    return torch if torch is not None and torch.cuda.is_available() else None

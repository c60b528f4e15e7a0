"""All weights of some modules to the GPU at once: read by several threads, through page-locked memory.

A plain `module.to("cuda")` reads a mapped file page by page in one thread, and copies from memory that is not locked.
Here several threads read pieces of the file into page-locked buffers, while the pieces before travel:

    file  --threads-->  ring of buffers  --copies, one after the other-->  GPU

A buffer is filled again when its copy has ended. So loading takes about the longer of reading and copying, and beside
the file's own pages no more RAM than the ring.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from shared.app.offload import MIB
from shared.app.streamer.lane import Lane, Ticket
from shared.app.streamer.parts import Part, block_roots

PIECE_BYTES = 32 * MIB  # each buffer's: long enough for the full rate of any bus
MOST_THREADS = 8  # two or three read a page cache as fast as a bus takes it; disks answer more at once


def upload_all(
    modules: Iterable[nn.Module], lane: Lane, *, threads: int | None = None, piece: int = PIECE_BYTES
) -> None:
    """Put all parameters and buffers of these modules, which are on the CPU, on the lane's device.

    threads: that read, None for as many as the machine has processors, 8 at most. piece: bytes of a buffer; there are
    two for each thread. What fails, such as memory, leaves all modules as they were. The caller closes the lane.
    """
    threads = threads or min(MOST_THREADS, os.cpu_count() or 1)
    parts = [part for module in modules for part in _parts_of(module)]
    with torch.inference_mode(False):  # else nothing outside could write into it
        for part in parts:
            part.memory = torch.empty(part.nbytes, dtype=torch.uint8, device=lane.device)
    lane.copy_after(lane.computed())  # what was queued on that memory before
    with ThreadPoolExecutor(threads, thread_name_prefix="read weights") as pool:
        ring = _Ring(lane, pool, 2 * threads, piece)
        for part in parts:
            for target, source in _pieces(part, piece):
                ring.send(target, source)
        ring.send_rest()
    lane.compute_after(lane.copied())
    for part in parts:
        part.attach()


def _parts_of(module: nn.Module) -> list[Part]:
    """A block's tensors share a piece of memory, and so do those that belong to no block."""
    roots = block_roots(module)
    inside = {member for root in roots.values() for member in root.modules()}
    rest = Part("outside of blocks", [member for member in module.modules() if member not in inside])
    return [rest, *(Part(name, list(root.modules())) for name, root in roots.items())]


def _pieces(part: Part, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(bytes on the device, bytes here) of everything in a part, (n,) uint8 each, n at most `most`."""
    assert part.memory is not None
    for offset, source, _ in part.pieces():
        for start in range(0, source.nbytes, most):
            some = source[start : start + most]
            yield part.memory[offset + start : offset + start + some.nbytes], some


class _Ring:
    """Page-locked buffers: each is being filled, or waits for its turn to travel, or travels."""

    def __init__(self, lane: Lane, pool: ThreadPoolExecutor, count: int, nbytes: int) -> None:
        self._lane, self._pool = lane, pool
        self._left, self._nbytes = count, nbytes  # buffers to be made yet
        self._filling: deque[tuple[Future[Tensor], Tensor, Tensor]] = deque()  # (filled part, target, buffer)
        self._travelling: deque[tuple[Tensor, Ticket]] = deque()  # a buffer, and when its copy has ended

    def send(self, target: Tensor, source: Tensor) -> None:
        """Have `source` read into a buffer, and copied when it is its turn."""
        buffer = self._empty_buffer()
        self._filling.append((self._pool.submit(_filled, buffer, source), target, buffer))
        while self._filling and self._filling[0][0].done():
            self._copy_oldest()

    def send_rest(self) -> None:
        while self._filling:
            self._copy_oldest()

    def _empty_buffer(self) -> Tensor:
        if self._left:
            self._left -= 1
            buffer = torch.empty(self._nbytes, dtype=torch.uint8)
            self._lane.lock(buffer)  # where the system refuses, copies are slower, and right
            return buffer
        if not self._travelling:
            self._copy_oldest()
        buffer, ended = self._travelling.popleft()
        self._lane.wait(ended)
        return buffer

    def _copy_oldest(self) -> None:
        filled, target, buffer = self._filling.popleft()
        self._lane.copy(target, filled.result())
        self._travelling.append((buffer, self._lane.copied()))


def _filled(buffer: Tensor, source: Tensor) -> Tensor:
    # By numpy: torch's copy_ would take a team of threads of its own in each of these.
    filled = buffer[: source.nbytes]
    np.copyto(filled.numpy(), source.numpy())
    return filled

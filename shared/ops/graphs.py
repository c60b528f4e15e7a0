"""Recordings of GPU work: what a function launches, kept as one CUDA graph and launched again at the price of one.

A graph runs on the very memory it was recorded with. Whoever records copies new inputs into the old ones first, and
copies the result away before the next replay. What the recorded work reads has to stay alive as long as the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Recording(Protocol):
    """One function's work, and where its result appears."""

    out: Tensor

    def replay(self) -> None:
        """Do the work again, on the memory's present numbers."""


class Recorder(Protocol):
    """Makes recordings on one device."""

    def record(self, work: Callable[[], Tensor]) -> Recording:
        """Record what work() launches; it must have run before with the same shapes. Its result is not valid yet.

        Raises torch.OutOfMemoryError, and RuntimeError for work that cannot be recorded, such as waiting for the GPU.
        """

    @property
    def nbytes(self) -> int:
        """Bytes that the recordings made so far keep for what lies between their inputs and results."""

    def drop(self) -> None:
        """Give the memory back; recordings made before must not be replayed any more."""


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: they run one after the other, never side by side."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # torch's handle of a memory pool
        self._bytes = 0

    def record(self, work: Callable[[], Tensor]) -> Recording:
        """See Recorder."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.memory_reserved(self._device)
        # Other threads may use the GPU meanwhile, for a preview or another model's weights.
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capture:
            out = work()
        self._bytes += max(torch.cuda.memory_reserved(self._device) - before, 0)
        return CudaRecording(graph, out)

    @property
    def nbytes(self) -> int:
        return self._bytes

    def drop(self) -> None:
        """See Recorder."""
        self._pool, self._bytes = None, 0


class CudaRecording:
    """A CUDA graph and its result."""

    def __init__(self, graph: torch.cuda.CUDAGraph, out: Tensor) -> None:
        self._graph, self.out = graph, out

    def replay(self) -> None:
        """See Recording."""
        self._graph.replay()

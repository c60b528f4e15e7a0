"""How bytes get to a device beside its computing."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

Ticket = Any  # a moment on the copying or the computing side: a CUDA event


class Lane(Protocol):
    """How bytes get to a device beside its computing. Copies are done one after the other."""

    @property
    def device(self) -> torch.device: ...

    def lock(self, memory: Tensor) -> bool:
        """Page-lock host memory; False where the system refuses."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy bytes, both (n,) uint8, source page-locked, after all earlier copies; returns at once."""

    def copied(self) -> Ticket:
        """The moment when all copies so far have ended."""

    def computed(self) -> Ticket:
        """The moment when all computing so far has ended."""

    def copy_after(self, moment: Ticket) -> None:
        """Copies from now on begin after that moment of computing."""

    def compute_after(self, moment: Ticket) -> None:
        """Computing from now on begins after that moment of copying."""

    def wait(self, moment: Ticket) -> None:
        """The program itself waits."""

    def close(self) -> None:
        """Wait for everything, and unlock the host memory."""


class CudaLane:
    """A CUDA stream of its own for the copies."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)
        self._locked: list[Tensor] = []
        # Memory must not be given back to the system while it is locked.
        self._unlock = weakref.finalize(self, _unlock, self._locked)

    @property
    def device(self) -> torch.device:
        return self._device

    def lock(self, memory: Tensor) -> bool:
        # Not pin_memory=True: torch rounds what it locks up to the next power of two.
        error: Any = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(error) != 0:
            return False
        self._locked.append(memory)
        return True

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def copied(self) -> Ticket:
        return self._stream.record_event()

    def computed(self) -> Ticket:
        return torch.cuda.current_stream(self._device).record_event()

    def copy_after(self, moment: Ticket) -> None:
        self._stream.wait_event(moment)

    def compute_after(self, moment: Ticket) -> None:
        torch.cuda.current_stream(self._device).wait_event(moment)

    def wait(self, moment: Ticket) -> None:
        moment.synchronize()

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        _unlock(self._locked)


def _unlock(memory: list[Tensor]) -> None:
    for locked in memory:
        torch.cuda.cudart().cudaHostUnregister(locked.data_ptr())
    memory.clear()

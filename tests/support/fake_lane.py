"""Pretended copying beside pretended computing, for the streamer: see shared/app/streamer/lane.py.

Two clocks, in seconds, one for copies and one for computing, each going on by itself until told to wait for the other.
A copy is done when somebody waits for it (`late`, the latest moment that is allowed) or at once (`late=False`, the
earliest), so a result that depends on luck differs between the two. A copy that would overwrite what queued computing
still reads is refused: on a real GPU nothing would tell.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.support.fake_cuda import GPU


class FakeLane:
    """To be used inside fake_cuda(). copies: bytes of each. locked: bytes that were page-locked.

    peak: most bytes of memory copied into that was in use at once.
    """

    device = GPU

    def __init__(self, *, rate: float = 1e9, late: bool = True, lockable: bool = True) -> None:
        """rate: bytes per second."""
        self.rate, self.late, self.lockable = rate, late, lockable
        self.copy_clock = self.compute_clock = 0.0
        self.copies: list[int] = []
        self.exposed = 0.0  # seconds that computing waited for copies
        self.locked = self.peak = 0
        self._memory: dict[int, tuple[StorageWeakRef, int]] = {}
        self.closed = False
        self.fail_at: int | None = None  # the copy of this number raises OutOfMemoryError
        self._pending: list[tuple[float, Tensor, Tensor]] = []
        self._read: dict[int, float] = {}  # by address: when computing has last read it
        self._after = 0.0  # the moment of computing that copies were told to wait for

    def lock(self, memory: Tensor) -> bool:
        self.locked += memory.nbytes if self.lockable else 0
        return self.lockable

    def copy(self, target: Tensor, source: Tensor) -> None:
        if len(self.copies) == self.fail_at:
            raise torch.OutOfMemoryError("pretended")
        assert target.dtype == source.dtype == torch.uint8
        for begin, read in self._read.items():
            if target.data_ptr() <= begin < target.data_ptr() + target.nbytes:
                assert read <= self._after, "overwrites weights that queued computing still reads"
        self.copies.append(source.nbytes)
        storage = target.untyped_storage()
        self._memory[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.resident())
        self.copy_clock += source.nbytes / self.rate
        self._pending.append((self.copy_clock, target, source))
        if not self.late:
            self._do(self.copy_clock)

    def resident(self) -> int:
        """Bytes of memory copied into that is in use now."""
        self._memory = {key: found for key, found in self._memory.items() if not found[0].expired()}
        return sum(nbytes for _, nbytes in self._memory.values())

    def copied(self) -> float:
        return self.copy_clock

    def computed(self) -> float:
        return self.compute_clock

    def copy_after(self, moment: float) -> None:
        self._after = max(self._after, moment)
        self.copy_clock = max(self.copy_clock, moment)

    def compute_after(self, moment: float) -> None:
        self.exposed += max(0.0, moment - self.compute_clock)
        self.compute_clock = max(self.compute_clock, moment)
        self._do(moment)

    def wait(self, moment: float) -> None:
        self._do(moment)

    def close(self) -> None:
        self._do(self.copy_clock)
        self.closed = True

    def compute(self, seconds: float, *reads: Tensor) -> None:
        """Let a kernel that reads these tensors take so long."""
        self.compute_clock += seconds
        self._read |= {tensor.data_ptr(): self.compute_clock for tensor in reads}

    def _do(self, moment: float) -> None:
        while self._pending and self._pending[0][0] <= moment:
            _, target, source = self._pending.pop(0)
            target.copy_(source)

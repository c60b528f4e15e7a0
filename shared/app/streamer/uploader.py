"""How parts get across: in one copy where they are page-locked, else through two small buffers that are."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.app.streamer.lane import Lane, Ticket
from shared.app.streamer.parts import Part


class Uploader:
    """Copies parts into memory on the device; what is not page-locked goes through two buffers that are."""

    def __init__(self, lane: Lane, staging: int) -> None:
        self.lane = lane
        self._size = staging
        self._staging: list[tuple[Tensor, Ticket]] = []  # a buffer, and when its last copy has ended

    def empty(self, nbytes: int) -> Tensor:
        """(n,) uint8 on the device, for copies: they begin when what was queued on this memory before has ended."""
        with torch.inference_mode(False):  # else nothing outside could write into it
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self.lane.device)
        self.lane.copy_after(self.lane.computed())
        return memory

    def upload(self, part: Part, memory: Tensor) -> None:
        """Queue the copies of a part; then its memory and arrival are set."""
        for offset, source, locked in part.pieces():
            if locked:
                self.lane.copy(memory[offset : offset + source.nbytes], source)
                continue
            for start in range(0, source.nbytes, self._size):
                piece = source[start : start + self._size]
                self._send(memory[offset + start : offset + start + piece.nbytes], piece)
        part.memory, part.arrival = memory, self.lane.copied()

    def _send(self, target: Tensor, piece: Tensor) -> None:
        """Copy through the buffer that was used longest ago, once its last copy has ended."""
        if len(self._staging) < 2:
            buffer = torch.empty(self._size, dtype=torch.uint8)
            self.lane.lock(buffer)  # where the system refuses, copies are slower, and right
        else:
            buffer, ended = self._staging.pop(0)
            self.lane.wait(ended)
        staged = buffer[: piece.nbytes].copy_(piece)
        self.lane.copy(target, staged)
        self._staging.append((buffer, self.lane.copied()))

"""One piece of memory that all layers of a model expand their weights into, one after the other.

A 4-bit weight of 20480 x 3840 takes 157 MB in bfloat16, 79 MB in 8 bits: once for the whole model, not once for each
layer, and as large as its largest layer. The numbers are good until the next layer computes.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Grows to the largest piece asked for, on each device; gone with the layers that share it."""

    def __init__(self) -> None:
        self._memory: dict[torch.device, Tensor] = {}

    def take(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of any numbers, which the next call with this device writes over."""
        size = shape[0] * shape[1] * dtype.itemsize
        held = self._memory.get(device)
        if held is None or held.numel() < size:
            self._memory.pop(device, None)
            held = None  # before the larger piece is asked for
            held = self._memory[device] = torch.empty(size, dtype=torch.uint8, device=device)
        return held[:size].view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held on all devices."""
        return sum(tensor.numel() for tensor in self._memory.values())

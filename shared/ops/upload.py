"""Small tensors on their way to a GPU in the middle of its work, without anybody waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values`, which lie on the CPU, on `device`.

    A copy from ordinary RAM to an NVIDIA GPU is waited for, and with it all work that was queued before. From
    page-locked RAM it takes its place in the queue; torch keeps that memory until the copy has been made.
    """
    if device.type != "cuda":
        return values.to(device)
    locked = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    return locked.copy_(values).to(device, non_blocking=True)

"""Resumable training state: written to a neighbour file and renamed, so that an interrupted save never
harms the last good one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, state dicts) atomically to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".part")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote: tensors and plain values, nothing executable. Raises FileNotFoundError."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state

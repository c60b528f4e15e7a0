"""Latents as tokens and back: squares of cells, filled up to a multiple of 32 with learned tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from models.z_image.config import SEQUENCE_MULTIPLE


def patchify(latents: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) -> (B, h/p * w/p, p*p*C), a patch listing row, column, channel."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """(B, rows * columns, p*p*C) -> (B, C, rows * p, columns * p), the inverse of patchify()."""
    batch, _, width = patches.shape
    channels = width // (patch * patch)
    x = patches.reshape(batch, rows, columns, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch, columns * patch)


def round_up(count: int) -> int:
    return -(-count // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE


def pad_tokens(x_BND: Tensor, length: int, pad_token: Tensor) -> Tensor:
    """The tokens (B, N, D) with copies of the learned pad token (1, D) behind them, `length` in all."""
    missing = length - x_BND.shape[1]
    if not missing:
        return x_BND
    return torch.cat([x_BND, pad_token.to(x_BND.dtype).expand(x_BND.shape[0], missing, -1)], dim=1)

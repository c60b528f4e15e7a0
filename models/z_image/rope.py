"""Rotary positions of three axes: where image and caption tokens stand, and the rotations that tell attention so.

A head's numbers are pairs, dealt out to the axes (sequence, row, column); a pair is turned by its token's position on
its axis, more slowly from pair to pair. Attention then sees differences of positions only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.z_image.config import TransformerConfig
from models.z_image.patches import round_up


class RotaryAxes(nn.Module):
    """Rotary angles of (sequence, row, column) positions; no weights, tables grow from the sizes at hand."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.axes_dims, self.axes_lens, self.theta = config.axes_dims, config.axes_lens, config.rope_theta
        self._last: tuple[object, tuple[Tensor, Tensor, Tensor | None]] | None = None
        self._last_negative: tuple[object, tuple[Tensor, Tensor | None]] | None = None

    def at(self, positions: Tensor, device: torch.device) -> Tensor:
        """Rotations of tokens at any positions, (B, tokens, 3) whole numbers on the CPU."""
        return self._rotation(positions, device)

    def for_caption(self, length: int, device: torch.device) -> Tensor:
        """Positions (1 + i, 0, 0) of the longest caption; shorter ones use its beginning."""
        return self._rotation(_caption_positions(length), device)

    def for_image(
        self, lengths: Sequence[int], rows: int, columns: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rotations of the padded image tokens, of image and caption tokens together, and the mask of the latter.

        lengths: padded caption lengths; the image sits one step behind its own caption, so images of captions of
        different length have different positions. One row serves all images when all lengths are equal.
        What the last call gave is kept: it is the same at every step.
        """
        key = (tuple(lengths), rows, columns, device)
        if self._last is None or self._last[0] != key:
            distinct = lengths[:1] if len(set(lengths)) == 1 else lengths
            image = _image_positions(distinct, rows, columns)
            caption = _caption_positions(max(distinct)).expand(len(distinct), -1, -1)
            joint = self._rotation(torch.cat([image, caption], dim=1), device)
            count = image.shape[1]
            self._last = key, (joint[:, :count], joint, length_mask(lengths, count, device))
        return self._last[1]

    def with_negative(
        self, joint: Tensor, image: int, lengths: Sequence[int], negative: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """`joint` (from for_image) followed by the negative captions, each as far before the image as if alone with it.

        image: padded image tokens. lengths, negative: padded lengths of each image's caption and negative caption.
        Attention sees differences of positions only, so a negative caption of another length need not be cut or filled
        up. Also returns the mask of image and negative captions.
        """
        device = joint.device
        key = (tuple(lengths), tuple(negative), joint.shape, image, device)
        if self._last_negative is None or self._last_negative[0] != key:
            pairs = list(zip(lengths, negative, strict=True))
            pairs = pairs[:1] if len(set(pairs)) == 1 else pairs
            positions = _caption_positions(max(negative)).repeat(len(pairs), 1, 1)
            positions[:, :, 0] += torch.tensor([[mine - other] for mine, other in pairs], device="cpu")
            tail = self._rotation(positions, device)
            rows = max(len(pairs), len(joint))
            wide = [table.expand(rows, -1, -1, -1, -1) for table in (joint, tail)]
            self._last_negative = key, (torch.cat(wide, dim=1), length_mask(negative, image, device))
        return self._last_negative[1]

    def _rotation(self, positions: Tensor, device: torch.device) -> Tensor:
        """Cosine and sine of each pair's angle, (B, tokens, 1, E / 2, 2) float32. positions: (B, tokens, 3) integers.

        Angles are worked out in float64 and rounded once to float32, as the reference does; on the CPU, because some
        accelerators have no float64, and every device then gets the same numbers.
        """
        angles = []
        for axis, width in enumerate(self.axes_dims):
            exponents = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
            angles.append(positions[..., axis, None].double() / self.theta**exponents)
        table = torch.cat(angles, dim=-1).float()[:, :, None]
        return torch.view_as_real(torch.polar(torch.ones_like(table), table)).to(device)


def _caption_positions(length: int) -> Tensor:
    positions = torch.zeros(1, length, 3, dtype=torch.int64, device="cpu")
    positions[0, :, 0] = torch.arange(1, length + 1, device="cpu")
    return positions


def _image_positions(lengths: Sequence[int], rows: int, columns: int) -> Tensor:
    """(len(lengths), padded image tokens, 3): one step behind the caption, then row and column; padding at 0."""
    grid = torch.cartesian_prod(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"))
    positions = torch.zeros(len(lengths), round_up(len(grid)), 3, dtype=torch.int64, device="cpu")
    positions[:, : len(grid), 0] = torch.tensor(lengths, device="cpu")[:, None] + 1
    positions[:, : len(grid), 1:] = grid
    return positions


def as_read(rope: Tensor) -> Tensor:
    """A table of rotations as blocks read it on its device: on a CPU as complex numbers, seen so once for them all."""
    return torch.view_as_complex(rope) if rope.is_cpu else rope


def length_mask(lengths: Sequence[int], before: int, device: torch.device) -> Tensor | None:
    """(B, 1, 1, before + L) bool, true where a key is real; None when all captions are equally long."""
    if len(set(lengths)) == 1:
        return None
    ends = torch.tensor(lengths, device=device)[:, None] + before
    return (torch.arange(before + max(lengths), device=device) < ends)[:, None, None]

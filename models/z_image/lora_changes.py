"""What a LoRA file does to one linear's weight W (out, in): the change D of its kind, applied without building D.

    LoRA        D = s * up @ down                        two thin products
    LoKr        D = s * kron(w1, w2)                     x is folded to (in1, in2), multiplied from both sides
    LoHa        D = s * (a1 @ b1) * (a2 @ b2)            of small rank it is a LoRA of rank r1 * r2 (the columns of both
                                                         factors multiplied pairwise); else D is rebuilt, rows by rows
    full        D as it is in the file

s is alpha / rank. The kron rule, by numbers: w1 (2, 3) and w2 (4, 5) make D (8, 15); row 4i + k, column 5j + l of D is
w1[i, j] * w2[k, l], so D x with x as a (3, 5) matrix is w1 @ (x @ w2^T), a (2, 4) matrix, read row by row.
Sources: LoRA arXiv 2106.09685; LoHa arXiv 2108.06098; LoKr arXiv 2309.14859 (LyCORIS), lycoris-lora 4.1.3 modules/.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a change that are built at a time where the whole is never kept: 1024 x 15360 float32 are 60 MiB.
ROWS_AT_ONCE = 1024


class Change(Protocol):
    """A change to a weight of `rows` x `columns`."""

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    def apply(self, x_TI: Tensor) -> Tensor:
        """D x for tokens (T, in): (T, out), in x's type and on its device, to which the change was moved."""

    def dense(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of D, float32."""

    def cut(self, start: int, stop: int) -> Change:
        """The change to rows start to stop alone."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Change:
        """The change with its tensors there."""


@dataclass(frozen=True)
class LowRank:
    """LoRA. down (rank, in), up (out, rank); `scale` is not in them."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rows(self) -> int:
        return self.up.shape[0]

    @property
    def columns(self) -> int:
        return self.down.shape[1]

    def apply(self, x_TI: Tensor) -> Tensor:
        return F.linear(F.linear(x_TI, self.down), self.up) * self.scale

    def dense(self, start: int, stop: int) -> Tensor:
        return self.scale * (self.up[start:stop].float() @ self.down.float())

    def cut(self, start: int, stop: int) -> LowRank:
        return replace(self, up=self.up[start:stop])

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        return LowRank(self.down.to(device, dtype), self.up.to(device, dtype), self.scale)


@dataclass(frozen=True)
class Kronecker:
    """LoKr. w1 (out1, in1), w2 (out2, in2), or w2 as the product of w2 (out2, rank) and w2_b (rank, in2)."""

    w1: Tensor
    w2: Tensor
    w2_b: Tensor | None = None
    scale: float = 1.0

    @property
    def rows(self) -> int:
        return self.w1.shape[0] * self.w2.shape[0]

    @property
    def columns(self) -> int:
        return self.w1.shape[1] * (self.w2 if self.w2_b is None else self.w2_b).shape[1]

    def apply(self, x_TI: Tensor) -> Tensor:
        folded = x_TI.unflatten(-1, (self.w1.shape[1], -1))
        if self.w2_b is not None:
            folded = F.linear(folded, self.w2_b)
        return (self.w1 @ F.linear(folded, self.w2)).flatten(-2) * self.scale

    def dense(self, start: int, stop: int) -> Tensor:
        w2 = self.w2.float() if self.w2_b is None else self.w2.float() @ self.w2_b.float()
        height = len(w2)
        first, last = start // height, -(-stop // height)  # rows of w1 that reach into start to stop
        rows = torch.kron(self.w1[first:last].float(), w2)
        return self.scale * rows[start - first * height : stop - first * height]

    def cut(self, start: int, stop: int) -> Change:
        height = self.w2.shape[0]
        if start % height or stop % height:  # the cut goes through a block: no Kronecker product any more
            return Dense(self.dense(start, stop))
        return replace(self, w1=self.w1[start // height : stop // height])

    def to(self, device: torch.device, dtype: torch.dtype) -> Kronecker:
        w2_b = None if self.w2_b is None else self.w2_b.to(device, dtype)
        return Kronecker(self.w1.to(device, dtype), self.w2.to(device, dtype), w2_b, self.scale)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: the elementwise product of two low-rank matrices. a1, a2 (out, rank); b1, b2 (rank, in)."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    scale: float = 1.0

    @property
    def rows(self) -> int:
        return self.a1.shape[0]

    @property
    def columns(self) -> int:
        return self.b1.shape[1]

    def as_low_rank(self) -> LowRank | None:
        """The same change as a LoRA of rank r1 * r2; None where that would hold more numbers than D."""
        rank = self.a1.shape[1] * self.a2.shape[1]
        if rank * (self.rows + self.columns) > self.rows * self.columns:
            return None
        up = (self.a1.float()[:, :, None] * self.a2.float()[:, None]).flatten(1)
        down = (self.b1.float()[:, None] * self.b2.float()[None]).flatten(0, 1)
        return LowRank(down, up, self.scale)

    def apply(self, x_TI: Tensor) -> Tensor:
        starts = range(0, self.rows, ROWS_AT_ONCE)  # each part of D is gone before the next is built
        return torch.cat([F.linear(x_TI, self._rows(i, i + ROWS_AT_ONCE)) for i in starts], dim=-1) * self.scale

    def dense(self, start: int, stop: int) -> Tensor:
        exact = Hadamard(self.a1.float(), self.b1.float(), self.a2.float(), self.b2.float())
        return self.scale * exact._rows(start, stop)

    def cut(self, start: int, stop: int) -> Hadamard:
        return replace(self, a1=self.a1[start:stop], a2=self.a2[start:stop])

    def to(self, device: torch.device, dtype: torch.dtype) -> Hadamard:
        a1, b1, a2, b2 = (t.to(device, dtype) for t in (self.a1, self.b1, self.a2, self.b2))
        return Hadamard(a1, b1, a2, b2, self.scale)

    def _rows(self, start: int, stop: int) -> Tensor:
        return (self.a1[start:stop] @ self.b1) * (self.a2[start:stop] @ self.b2)


@dataclass(frozen=True)
class Dense:
    """A full difference (out, in)."""

    weight: Tensor
    scale: float = 1.0

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        return self.weight.shape[1]

    def apply(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self.weight) * self.scale

    def dense(self, start: int, stop: int) -> Tensor:
        return self.scale * self.weight[start:stop].float()

    def cut(self, start: int, stop: int) -> Dense:
        return replace(self, weight=self.weight[start:stop])

    def to(self, device: torch.device, dtype: torch.dtype) -> Dense:
        return Dense(self.weight.to(device, dtype), self.scale)

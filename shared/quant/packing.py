"""Packed weights: how a matrix is kept in few bits, apart from how a file spells it and how a product is computed.

    a file's tensors  --format (formats/*.py)-->  Packed  --kernel (kernels/*.py)-->  y = x W^T

A `Packing` is one way of keeping a matrix (8-bit integers with row scales, E2M1 codes in blocks of 16, ...), a
description without tensors. `Packed` is a matrix kept that way: the description and its tensors by name. Several file
spellings decode into one packing: quanto's and ComfyUI's int8 are the same numbers under other names.

Tensors are kept in natural order, row n of every tensor (or of its first axis) belonging to output n, so that rows can
be taken and joined by plain slicing. What files shuffle for a GPU's sake (nunchaku's tiles, NVFP4's swizzled scales)
stays shuffled until a kernel wants it in order; its packing knows how to cut and join it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Packing(Protocol):
    """One way of keeping a matrix. Implementations are frozen dataclasses, equal when their fields are."""

    @property
    def name(self) -> str:
        """For people and for choosing kernels: "int8", "nvfp4"."""

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The matrix (rows, columns) in `dtype`, computed in float32 or better before the last rounding."""

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of rows [start, stop), views where possible."""

    def join_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        """The parts' rows on top of each other, exactly; None when this packing cannot hold them as one matrix."""


@dataclass(frozen=True)
class Packed:
    """A matrix (rows, columns) kept in a packing."""

    packing: Packing
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.packing.dequantize(self.tensors, dtype)

    def take_rows(self, start: int, stop: int) -> Packed:
        return Packed(self.packing, (stop - start, self.shape[1]), self.packing.take_rows(self.tensors, start, stop))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def join_rows(parts: Sequence[Packed]) -> Packed | None:
    """One matrix of all parts' rows in order; None unless all are packed alike and the packing can join them."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if not are_alike(parts):
        return None
    tensors = first.packing.join_rows([p.tensors for p in parts])
    return None if tensors is None else Packed(first.packing, (sum(p.shape[0] for p in parts), first.shape[1]), tensors)


def are_alike(parts: Sequence[Packed]) -> bool:
    """Whether all are packed in the same way and equally wide."""
    return all(p.packing == parts[0].packing and p.shape[1] == parts[0].shape[1] for p in parts)

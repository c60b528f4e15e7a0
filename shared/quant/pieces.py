"""Matrices whose rows lie in several places: joined without a copy where somebody has laid the places side by side.

A file that keeps w1 and w3, or q, k and v, apart is mapped, and one linear here needs them all. Joining them in RAM
costs a copy of the weights. But whoever brings them to a GPU copies them anyway, and may lay them one behind the other:

    in the file        codes of w1 ... scales of w1 ... codes of w3 ... scales of w3 ...
    on the GPU         codes of w1, codes of w3, scales of w1, scales of w3

Then the codes of both are one tensor, and so are the scales. What needs them as one before gets a copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from shared.quant.packing import Packed, are_alike

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.quant.packing import Packing

    Outline = tuple[str, tuple[int, ...], torch.dtype]


class Stackable(ABC):
    """A packing whose joined rows are its parts' tensors one behind the other."""

    @abstractmethod
    def stack_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]] | None:
        """The pieces that make up each tensor of the joined rows, one of each part, or one that serves all of them.

        Views where possible. None where joining these takes more than laying them one behind the other.
        """

    def join_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        """As Packing's."""
        import torch

        pieces = self.stack_rows(parts)
        if pieces is None:
            return None
        return {name: of[0] if len(of) == 1 else torch.cat(of) for name, of in pieces.items()}


class Pieces(Mapping[str, "Tensor"]):
    """The tensors of joined rows by name, each made one when it is asked for.

    heights: rows of each part. of: as Stackable.stack_rows() gives them.
    """

    def __init__(self, heights: Sequence[int], of: Mapping[str, Sequence[Tensor]]) -> None:
        self.heights = heights
        self.of = of

    def __getitem__(self, name: str) -> Tensor:
        import torch

        pieces = self.of[name]
        one = as_one(pieces)
        return torch.cat(tuple(pieces)) if one is None else one

    def __contains__(self, name: object) -> bool:
        return name in self.of

    def __iter__(self) -> Iterator[str]:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)

    def outline(self) -> tuple[Outline, ...]:
        """What outline() tells of these, without joining them."""
        return tuple((name, (sum(map(len, of)), *of[0].shape[1:]), of[0].dtype) for name, of in self.of.items())

    def parts(self, packing: Packing, columns: int) -> list[Packed]:
        """The matrices that were put on top of each other."""
        return [
            Packed(packing, (height, columns), {name: of[i if len(of) > 1 else 0] for name, of in self.of.items()})
            for i, height in enumerate(self.heights)
        ]


def stack_rows(parts: Sequence[Packed]) -> Packed | None:
    """One matrix of all parts' rows in order, its tensors Pieces; None where they cannot be had as such."""
    packing, columns = parts[0].packing, parts[0].shape[1]
    if not isinstance(packing, Stackable) or not are_alike(parts):
        return None
    pieces = packing.stack_rows([part.tensors for part in parts])
    if pieces is None:
        return None
    heights = [part.shape[0] for part in parts]
    return Packed(packing, (sum(heights), columns), Pieces(heights, pieces))


def outline(packed: Packed) -> tuple[Outline, ...]:
    """Name, shape and type of each of a matrix's tensors."""
    if isinstance(packed.tensors, Pieces):
        return packed.tensors.outline()
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in packed.tensors.items())


def as_one(pieces: Sequence[Tensor]) -> Tensor | None:
    """All rows as one tensor, where the pieces lie one behind the other; None where they do not.

    Looked at anew each time: the memory is an offloader's, and may be another's in the next step.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    at, rows = first.data_ptr(), 0
    for piece in pieces:
        if piece.data_ptr() != at or not piece.is_contiguous():
            return None
        at += piece.nbytes
        rows += piece.shape[0]
    storage = first.untyped_storage().data_ptr()
    if any(piece.untyped_storage().data_ptr() != storage for piece in pieces[1:]):
        return None  # neighbours by chance
    strides = (first.numel() // first.shape[0], *first.stride()[1:])  # a single row's first stride may be anything
    return first.detach().as_strided((rows, *first.shape[1:]), strides)

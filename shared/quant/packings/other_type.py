"""Plain numbers of another type than is computed in: float32 or float16 files, for bfloat16.

Opening a file must not read it, so these numbers stay where they lie, and are cast when a layer is first used
(kernels/cast.py) and not before. From then on the layer is a plain matrix of the type that is computed in.

A linear may be made of rows that stand apart in a file; they become one matrix in the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Numbers cast at a time on their way through float32: torch takes three times as long from float16 to bfloat16 at once.
_AT_ONCE = 2**20


@dataclass(frozen=True)
class OtherType:
    """Tensors "0", "1", ...: floats (some rows, columns) of 16 or 32 bits, rows in order. computed: the type wanted."""

    computed: torch.dtype
    name = "other-type"

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        import torch

        pieces = self.pieces(tensors)
        result = torch.empty(
            (sum(len(piece) for piece in pieces), *pieces[0].shape[1:]), dtype=dtype, device=pieces[0].device
        )
        start, step = 0, max(1, _AT_ONCE // pieces[0].shape[1])
        for piece in pieces:
            for row in range(0, len(piece), step):
                some = piece[row : row + step]
                result[start + row : start + row + len(some)] = some.float()
            start += len(piece)
        return result

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        taken: list[Tensor] = []
        for piece in self.pieces(tensors):
            if start < len(piece) and stop > 0:
                taken.append(piece[max(start, 0) : stop])
            start, stop = start - len(piece), stop - len(piece)
        return self.of(taken)

    def join_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return self.of([piece for part in parts for piece in self.pieces(part)])

    @staticmethod
    def of(pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors of rows that lie in several places."""
        return {str(i): piece for i, piece in enumerate(pieces)}

    @staticmethod
    def pieces(tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors[str(i)] for i in range(len(tensors))]

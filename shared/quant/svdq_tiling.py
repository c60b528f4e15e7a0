"""The tiles in which nunchaku's SVDQuant files keep codes, scales and the low-rank branch, for a GPU's tensor cores.

The shapes of tiled tensors are nominal: element [i, j] is not row i, column j, and a slice of `wscales` is nonsense.
Each layout is a view of many small axes, reordered. Read an axis list as digits of a position, most significant first:

    codes, as 32-bit words of 8 consecutive columns (low nibble first, so that only whole words have to move):
        file     n/128, k/64, n/16%8, n%8, k/8%4, n/8%2, k/32%2
        natural  n/128, n/16%8, n/8%2, n%8,  k/64, k/32%2, k/8%4
    scales of 16 bits, and vectors as one group g:
        file     n/128, g, n/16%8, n/2%4, n/8%2, n%2
    scales of 8 bits:
        file     n/128, g/4, n%8, n/8%4, n/32%4, g%4
    proj_up, holding up (N, R):
        file     n/16, r/16, n%8, r/2%4, n/8%2, r/8%2, r%2
    proj_down, holding down (R, K) under the nominal shape (K, R):
        file     k/16, r/16, r%8, k/2%4, r/8%2, k/8%2, k%2

Worked once: the code of row 13, column 50 in a matrix 128 x 128. Row 13 has the digits n/16%8 = 0, n/8%2 = 1,
n%8 = 5; column 50 has k/64 = 0, k/32%2 = 1, k/8%4 = 2, and is number 2 of its word. In the file's order the digits
0, 0, 0, 5, 2, 1, 1 of a number system with the sizes 1, 2, 8, 8, 4, 2, 2 are word ((5 * 4 + 2) * 2 + 1) * 2 + 1 = 91,
so the code is the low nibble of byte 91 * 4 + 1 = 365.

N is a multiple of 128, K too, R of 16. Source: nunchaku's packer (nunchaku/lora/flux/packer.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """One of the layouts above: the digits of a natural (row, column), and the order in which a file ranks them.

    rows, columns: sizes of the digits below the first, most significant first; the first digit takes the rest.
    order: indices into (row digits, column digits), as they rank in the file.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]

    def to_file(self, natural: Tensor) -> Tensor:
        """A matrix in natural order -> its elements in the file's order, flat."""
        return natural.reshape(self._sizes(*natural.shape)).permute(self.order).reshape(-1)

    def to_natural(self, stored: Tensor, rows: int, columns: int) -> Tensor:
        """The file's elements, of whatever nominal shape -> the matrix (rows, columns), contiguous."""
        sizes = self._sizes(rows, columns)
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        return stored.reshape([sizes[i] for i in self.order]).permute(places).reshape(rows, columns)

    def without_last(self) -> Tiling:
        """The same of whole runs of the last column digit, which ranks last in the file as well."""
        assert self.columns
        assert self.order[-1] == len(self.order) - 1
        return Tiling(self.rows, self.columns[:-1], self.order[:-1])

    def _sizes(self, rows: int, columns: int) -> Sequence[int]:
        return (rows // prod(self.rows), *self.rows, columns // prod(self.columns), *self.columns)


WORDS = Tiling(rows=(8, 2, 8), columns=(2, 4), order=(0, 4, 1, 3, 6, 2, 5))
SCALES = Tiling(rows=(8, 2, 4, 2), columns=(), order=(0, 5, 1, 3, 2, 4))
MICRO_SCALES = Tiling(rows=(4, 4, 8), columns=(4,), order=(0, 4, 3, 2, 1, 5))
_FOUR = 4  # scales of 8 bits in a run
UP = Tiling(rows=(2, 8), columns=(2, 4, 2), order=(0, 3, 2, 5, 1, 4, 6))
DOWN = Tiling(rows=(2, 8), columns=(2, 4, 2), order=(3, 0, 2, 5, 1, 4, 6))


def unpack_scales(stored: Tensor, rows: int, groups: int) -> Tensor:
    """Tiled scales of 8 or 16 bits -> (rows, groups); a vector is one group."""
    import torch

    if stored.dtype == torch.float8_e4m3fn:
        fours = stored.contiguous().view(torch.uint8).flatten()
        if fours.storage_offset() % _FOUR:
            fours = fours.clone()
        # The last digit is the same in both orders, so four scales move together.
        words = MICRO_SCALES.without_last().to_natural(fours.view(torch.int32), rows, groups // _FOUR)
        return words.view(stored.dtype)
    return SCALES.to_natural(stored, rows, groups)

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

What is read is put in order by compiled code where that can be (kernels/compiled_tiles.py): the codes of 20480 x 3840
numbers in 8 ms instead of 55 on an EPYC core, besides the 15 that new memory takes either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

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


ROWS = 128  # of a tile of codes or scales, and of every tensor's bytes that lie together
WORDS = Tiling(rows=(8, 2, 8), columns=(2, 4), order=(0, 4, 1, 3, 6, 2, 5))
SCALES = Tiling(rows=(8, 2, 4, 2), columns=(), order=(0, 5, 1, 3, 2, 4))
MICRO_SCALES = Tiling(rows=(4, 4, 8), columns=(4,), order=(0, 4, 3, 2, 1, 5))
_FOUR = 4  # scales of 8 bits in a run
BAND = 16  # rows
_BLOCK_WORDS = 8  # of each of them in what compiled_tiles.py calls a block
UP = Tiling(rows=(2, 8), columns=(2, 4, 2), order=(0, 3, 2, 5, 1, 4, 6))
DOWN = Tiling(rows=(2, 8), columns=(2, 4, 2), order=(3, 0, 2, 5, 1, 4, 6))

_COMPILED_FROM = 2**16  # words; fewer are put in order by torch before compiled code is found


def codes_in_order(pieces: Sequence[Tensor]) -> Tensor:
    """qweight (n, K/2) of each piece -> the codes (N, K/2) uint8 of all their rows."""
    import torch

    def blocks(_high: int, wide: int) -> tuple[int, ...]:
        return 8, wide * 8, 1, 8

    return _words_in_order(WORDS, pieces, blocks).view(torch.uint8)


def up_in_order(pieces: Sequence[Tensor]) -> Tensor:
    """proj_up (n, R) of each piece -> up (N, R)."""

    def blocks(_high: int, wide: int) -> tuple[int, ...]:
        return 1, wide, 0, 1

    return _words_in_order(UP.without_last(), pieces, blocks).view(pieces[0].dtype)


def down_in_order(proj_down: Tensor) -> Tensor:
    """proj_down (K, R) -> down (R, K)."""

    def blocks(high: int, _wide: int) -> tuple[int, ...]:
        return 1, 1, 0, high

    return _words_in_order(DOWN.without_last(), [proj_down.view(proj_down.shape[::-1])], blocks).view(proj_down.dtype)


def scales_in_order(pieces: Sequence[Tensor]) -> Tensor:
    """wscales (n, G) of each piece -> the scales (N, G) of all their rows."""
    import torch

    first = pieces[0]
    groups, are_bytes = first.shape[1], first.dtype == torch.float8_e4m3fn
    found = torch.empty(sum(map(len, pieces)), groups, dtype=first.dtype, device=first.device)
    place = 0
    for piece in pieces:
        target = found[place : place + len(piece)]
        if _is_compiled(piece):
            _over_bands("untile_scales", groups, piece, (are_bytes,), target)
        else:
            target.copy_(unpack_scales(piece, len(piece), groups))
        place += len(piece)
    return found


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


def pack_scales(natural: Tensor) -> Tensor:
    """Scales (rows, groups) of 8 or 16 bits -> as a file has them, flat."""
    import torch

    if natural.dtype == torch.float8_e4m3fn:
        return MICRO_SCALES.to_file(natural.view(torch.uint8)).view(natural.dtype)
    return SCALES.to_file(natural)


def _words_in_order(tiling: Tiling, pieces: Sequence[Tensor], blocks: Callable[[int, int], tuple[int, ...]]) -> Tensor:
    """The 32-bit words of all rows of these pieces, whose shapes are those of the rows in order.

    tiling: of words. blocks: of how many blocks high and wide a piece is -> `of`, `far`, `near` and `across` as
    compiled_tiles.untile() wants them.
    """
    import torch

    words = [piece.contiguous().view(torch.int32) for piece in pieces]
    width = words[0].shape[1]
    found = words[0].new_empty(sum(map(len, words)), width)
    place = 0
    for piece in words:
        high, wide = len(piece) // BAND, width // _BLOCK_WORDS
        target = found[place : place + len(piece)]
        if _is_compiled(piece):
            _over_bands("untile", wide, piece, blocks(high, wide), target)
        else:
            target.copy_(tiling.to_natural(piece, len(piece), width))
        place += len(piece)
    return found


def _is_compiled(piece: Tensor) -> bool:
    import torch

    from shared.ops import compiled_ready

    # A stand-in of a mode that only works out shapes has no memory.
    is_read = type(piece) is torch.Tensor and piece.is_cpu and piece.is_contiguous()
    return is_read and piece.numel() >= _COMPILED_FROM and compiled_ready.why_not() is None


def _over_bands(loop: str, width: int, piece: Tensor, arguments: tuple[Any, ...], target: Tensor) -> None:
    from shared.ops import compiled
    from shared.quant.kernels import compiled_tiles

    compiled.over_rows(
        getattr(compiled_tiles, loop), len(piece) // BAND, width, piece.data_ptr(), *arguments,
        target.data_ptr(), numbers=BAND * piece.shape[1],
    )  # fmt: skip

"""The order in which NVFP4 and MXFP8 files keep their block scales, and the way back to rows and columns.

Blackwell's tensor cores read the scales of 128 rows and 4 blocks at a time, so files hold them as a sequence of such
128 x 4 tiles, 512 bytes each, and inside a tile rows 0, 32, 64 and 96 lie side by side:

    scales as a matrix, here (256, 8)         the file: tiles one after another, left to right, then down
    +------+------+                           | A: 512 bytes | B: 512 bytes | C | D |
    |  A   |  B   |  128 rows
    +------+------+                           inside a tile: 32 lines of 16 bytes, line i is
    |  C   |  D   |  128 rows                 row i: 4 scales, row i + 32: 4, row i + 64: 4, row i + 96: 4
    +------+------+
     4 cols  4 cols

    flat(r, c) = (r // 128 * C + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4,   C = ceil(columns / 4)

Worked once: the scale of row 37, block 6 of that matrix (C = 2) is in tile 0 * 2 + 1 = B, line 37 % 32 = 5, second
group of four (37 // 32 = 1), place 6 % 4 = 2: byte 512 + 5 * 16 + 1 * 4 + 2 = 598. The file's tensor still claims the
shape (256, 8), where byte 598 is row 74, column 6: reading it as a plain matrix gives another row's scale, and a
picture of noise.

Matrices are padded with zeros to whole tiles, (64, 24) to (128, 24), (300, 6) to (384, 8), and keep that padded
shape in the file. A band of 128 rows is contiguous, so rows may be cut from a swizzled tensor at multiples of 128 and
nowhere else. This program leaves them so, and every kernel reads them so; an order of rows and columns is made where
something else is to be cut or looked at.
Source: cuBLAS documentation, "1D block scaling factors layout"; checked against comfy-kitchen 0.2.40.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BAND = 128  # rows, between which scales may be cut
TILE_COLUMNS = 4
_LINES = 32  # of a tile; each holds rows i, i + 32, i + 64, i + 96


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape that a file gives to swizzled scales of `rows` rows with `columns` blocks each."""
    return -(-rows // BAND) * BAND, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def swizzle(scales: Tensor) -> Tensor:
    """Scales (rows, blocks), one byte each, as a file holds them: tiled, padded with zeros, of padded_shape()."""
    import torch

    rows, columns = padded_shape(*scales.shape)
    padded = torch.zeros(rows, columns, dtype=torch.uint8, device=scales.device)
    padded[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
    tiles = padded.view(rows // BAND, BAND // _LINES, _LINES, columns // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns).view(scales.dtype)


def unswizzle(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Scales (rows, blocks) in natural order, contiguous, from a file's tensor of padded_shape(rows, columns)."""
    import torch

    bands, tiles = (size // tile for size, tile in zip(padded_shape(rows, columns), (BAND, TILE_COLUMNS), strict=True))
    fours = stored.contiguous().view(torch.uint8).flatten()
    if fours.storage_offset() % TILE_COLUMNS:
        fours = fours.clone()
    lines = fours.view(torch.int32).view(bands, tiles, _LINES, BAND // _LINES)  # the four of a line move together
    natural = lines.permute(0, 3, 2, 1).reshape(bands * BAND, tiles).view(torch.uint8)
    return natural[:rows, :columns].contiguous().view(stored.dtype)

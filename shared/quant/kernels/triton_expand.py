"""4-bit weights made wider by Triton, in one pass: what a product then reads.

    SVDQuant   code * scale * row_scale / smooth     codes INT4 or E2M1, even column in the low nibble
    NVFP4      code * block_scale * tensor_scale     codes E2M1, even column in the high nibble as a rule

expand() writes 16 or 32 bits, expand_rounded() 8 bits with one scale for each row, for the kernels of
triton_matmul.py; rounding a weight of 4 bits to 8 once more adds 0.8 % (int8) or 2.6 % (E4M3) to its 7 to 15 %.
Both read 0.56 bytes a weight and write two or one: 20480 x 3840 at 4.3 TB/s takes 0.05 ms or 0.03 ms.

Codes and E4M3 scales are decoded by placing their bits into a float16's and multiplying by a power of two, exactly, so
that cards without 8-bit floats can do it too.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from shared.ops import tuning
from shared.ops.rounding import CODES, Kind
from shared.ops.triton_kernels import store_row
from shared.ops.triton_ready import capability, interpreted
from shared.quant.packing import Packed
from shared.quant.packings.nvfp4 import BLOCK, Nvfp4
from shared.quant.packings.svdq import Svdq
from shared.quant.swizzle import TILE_COLUMNS

_INT4, _E2M1, _E2M1_HIGH_FIRST = 0, 1, 2


@dataclass(frozen=True)
class FourBits:
    """A 4-bit weight as the kernels read it, whichever packing it is kept in.

    codes: (N, K / 2) uint8. scales: (N, K / group) a float type, or uint8 that are E4M3; or swizzled uint8, as
    swizzle.py pads them, `tiles` side by side. row_scale: (N,) float32. smooth: (K,) divides the columns, None for 1.
    """

    coding: int
    codes: Tensor
    scales: Tensor
    row_scale: Tensor
    smooth: Tensor | None
    group: int
    tiles: int = 0

    @staticmethod
    def of(packed: Packed, *, smoothed: bool = False) -> FourBits:
        """packed: Svdq, without its low-rank branch, or Nvfp4. smoothed: leave SVDQuant's smoothing in."""
        tensors = packed.tensors
        if isinstance(packed.packing, Nvfp4):
            codes, scales = tensors["codes"], tensors["block_scales"]
            row_scale = tensors["tensor_scale"].expand(len(codes), 1).contiguous().flatten()  # one number, as a rule
            coding = _E2M1 if packed.packing.low_first else _E2M1_HIGH_FIRST
            tiles = scales.shape[1] // TILE_COLUMNS if packed.packing.swizzled else 0
            return FourBits(coding, codes, scales, row_scale, None, BLOCK, tiles)
        assert isinstance(packed.packing, Svdq)
        scales = tensors["scales"].contiguous()  # another kernel may have had them the other way round
        return FourBits(
            _INT4 if packed.packing.kind == "int4" else _E2M1,
            tensors["codes"],
            scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales,
            tensors["row_scale"].flatten(),
            None if smoothed else tensors["smooth"],
            packed.shape[1] // scales.shape[1],
        )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), 2 * self.codes.shape[1]


def expand(weight: FourBits, out: Tensor) -> Tensor:
    """The weight's numbers written into out (N, K) of a float type, which is returned."""
    rows, columns = weight.shape
    launch = tuning.launch("expand", capability(out.device), columns)
    tall, wide = launch.pop("ROWS"), max(launch.pop("WIDTH"), weight.group)
    _expand[(-(-rows // tall), -(-columns // wide))](
        weight.codes, weight.scales, weight.row_scale, _or(weight.smooth, out), out, rows, columns, weight.tiles,
        CODING=weight.coding, SWIZZLED=weight.tiles > 0, HAS_SMOOTH=weight.smooth is not None, GROUP=weight.group,
        ROWS=tall, WIDTH=wide, **launch,
    )  # fmt: skip
    return out


def expand_rounded(weight: FourBits, codes: Tensor) -> Tensor:
    """The weight's numbers in 8 bits written into codes (N, K), int8 or float8_e4m3fn; returns scales (N, 1)."""
    rows, columns = weight.shape
    scale = torch.empty(rows, 1, dtype=torch.float32, device=codes.device)
    width = 1 << (columns - 1).bit_length()
    _expand_rounded[(rows,)](
        weight.codes, weight.scales, weight.row_scale, _or(weight.smooth, scale), codes, scale, columns, weight.tiles,
        CODING=weight.coding, SWIZZLED=weight.tiles > 0, HAS_SMOOTH=weight.smooth is not None, GROUP=weight.group,
        ROUND=1 if codes.dtype == torch.int8 else 3 if interpreted() else 2, WIDTH=width,
        **tuning.launch("row", capability(codes.device), width),
    )  # fmt: skip
    return scale


def codes_for(kind: Kind) -> torch.dtype:
    """The type of the codes that expand_rounded() writes for a product of this kind."""
    return CODES[kind]


def _or(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """A kernel wants a pointer also where it reads nothing."""
    return instead if tensor is None else tensor


@triton.jit
def _expand(
    codes, scales, row_scale, smooth, out, rows, columns, tiles,
    CODING: tl.constexpr, SWIZZLED: tl.constexpr, HAS_SMOOTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS x WIDTH numbers. WIDTH: a multiple of GROUP."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first = tl.program_id(1) * WIDTH
    there = (row < rows)[:, None]
    numbers = _four_bits(
        codes, scales, row_scale, row, first, there, columns, tiles, CODING, SWIZZLED, GROUP, ROWS, WIDTH
    )
    column = first + tl.arange(0, WIDTH)
    inside = there & (column < columns)[None, :]
    if HAS_SMOOTH:
        numbers = numbers / tl.load(smooth + column, mask=column < columns, other=1.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], numbers.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _expand_rounded(
    codes, scales, row_scale, smooth, out, out_scale, columns, tiles,
    CODING: tl.constexpr, SWIZZLED: tl.constexpr, HAS_SMOOTH: tl.constexpr, GROUP: tl.constexpr, ROUND: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A whole row of at most WIDTH numbers, its largest one known before it is written."""
    row = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    numbers = _four_bits(
        codes, scales, row_scale, row, 0, (row >= 0)[:, None], columns, tiles, CODING, SWIZZLED, GROUP, 1, WIDTH
    )
    numbers = tl.reshape(numbers, (WIDTH,))
    column = tl.arange(0, WIDTH)
    inside = column < columns
    if HAS_SMOOTH:
        numbers = numbers / tl.load(smooth + column, mask=inside, other=1.0).to(tl.float32)
    store_row(out, out_scale, tl.program_id(0).to(tl.int64), column, inside, columns, numbers, ROUND)


@triton.jit
def _four_bits(
    codes, scales, row_scale, row, first, there, columns, tiles,
    CODING: tl.constexpr, SWIZZLED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The numbers (ROWS, WIDTH) from column `first` on, float32; zeros beyond the last column."""
    pair = first // 2 + tl.arange(0, WIDTH // 2)
    bytes_ = tl.load(
        codes + row[:, None] * (columns // 2) + pair[None, :], mask=there & (pair < columns // 2)[None, :], other=0
    ).to(tl.int32)
    low, high = bytes_ & 15, bytes_ >> 4
    four = tl.join(high, low) if CODING == 2 else tl.join(low, high)
    four = tl.reshape(four, (ROWS, WIDTH // GROUP, GROUP))
    numbers = ((four ^ 8) - 8).to(tl.float32) if CODING == 0 else _e2m1(four)

    group = first // GROUP + tl.arange(0, WIDTH // GROUP)
    groups = columns // GROUP
    if SWIZZLED:  # swizzle.py
        place = (row // 128 * tiles * 512 + row % 32 * 16 + row % 128 // 32 * 4)[:, None]
        place += (group // 4 * 512 + group % 4)[None, :]
    else:
        place = row[:, None] * groups + group[None, :]
    stored = tl.load(scales + place, mask=there & (group < groups)[None, :], other=0)
    scale = _e4m3(stored.to(tl.int32)) if scales.dtype.element_ty == tl.uint8 else stored.to(tl.float32)
    scale = scale * tl.load(row_scale + row[:, None], mask=there, other=0.0)
    return tl.reshape(numbers * scale[:, :, None], (ROWS, WIDTH))


@triton.jit
def _e2m1(code):
    """E2M1 codes 0 to 15 -> float32. Two bits of exponent and one of significand lie so in float16, 2**14 too small."""
    bits = ((code & 8) << 12) | ((code & 7) << 9)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _e4m3(byte):
    """E4M3 bytes -> float32, NaN aside: as in float16, 2**8 too small."""
    bits = ((byte & 128) << 8) | ((byte & 127) << 7)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0

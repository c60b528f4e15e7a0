"""nunchaku's tiles read by the CPU, compiled by numba: unpacked for a product as they lie, or put in order.

svdq_tiling.py draws the layouts. Codes, `up` and `down` are all made of *blocks*: 512 bytes that hold 16 rows of eight
32-bit words each (8 codes, or two numbers of 16 bits), ranked by row % 8, word % 4, row / 8, word / 4. They differ in
how blocks follow each other:

    block (i, j), of rows from 16 i and words from 8 j on, of a matrix `wide` blocks wide and `high` blocks high
        codes  (i / 8 * wide + j) * 8 + i % 8        up  i * wide + j        down  j * high + i

Sixteen rows are a *band*, the unit of all kernels here: of each tile of codes 512 bytes in one piece, which are put in
order in the first cache. The numbers are those that compiled_rows.py makes of codes in order; but here the order of
multiplications is spelled out, which there a compiler may choose.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from shared.ops.compiled_kernels import BFLOAT16, CODES, LARGEST_CODE, SMALLEST_SCALE, at, bits_of, floats, number
from shared.quant.kernels.compiled_rows import E4M3, HALF, INT4, _e4m3, _half, _twice_e2m1
from shared.quant.svdq_tiling import BAND

BLOCK = 512  # bytes
_BLOCK_ROW = 32  # bytes of a block's row
_COLUMNS = 64  # codes of a block's row
_BANDS = 8  # of a tile of codes or scales
_E2M1_BYTES = 8  # of a group
_AT_ONCE = 8  # blocks put in order before they are unpacked: 4 KiB

_LOW, _HIGH, _WORD = np.uint64(0xFFFFFFFF), np.uint64(0xFFFFFFFF00000000), np.uint64(32)
_ONE, _FOUR, _EIGHT, _FIFTEEN, _SIXTEEN = (np.uint32(value) for value in (1, 4, 8, 15, 16))
_BYTE, _BELOW_HALF, _UPPER_HALF, _MAGNITUDE = (np.uint32(v) for v in (0xFF, 0x7FFF, 0xFFFF0000, 0x7FFFFFFF))

# 2^23 + n is a float32 whose last digits are n, and 2^23 + 2^22 + x is rounded to such a number, halves to even.
_SIGNED_CODE, _SIGN_AND_OFFSET = np.uint32(0x4B000008), np.float32(2**23 + 8)
_ROUNDING = np.float32(2**23 + 2**22)

# The largest number of each kind (E2M1's doubled) in int8 codes.
_INT4_PER_CODE, _E2M1_PER_CODE = np.float32(8) / LARGEST_CODE, np.float32(12) / LARGEST_CODE

exact = njit(error_model="numpy", nogil=True, cache=True)


# --------------------------------------------------------------------------------------------------- putting in order


@exact
def _put_block(source, target, stride):
    """The 16 rows of a block, `stride` bytes apart. Half a row's words come from one 32-bit half of four pairs."""
    pairs = carray(at(source), BLOCK // 8, np.uint64)
    for half in range(2):
        for eighth in range(8):
            a, b = pairs[eighth * 8 + half], pairs[eighth * 8 + half + 2]
            c, d = pairs[eighth * 8 + half + 4], pairs[eighth * 8 + half + 6]
            row = carray(at(target + (half * 8 + eighth) * stride), 4, np.uint64)
            row[0] = (a & _LOW) | (b << _WORD)
            row[1] = (c & _LOW) | (d << _WORD)
            row[2] = (a >> _WORD) | (b & _HIGH)
            row[3] = (c >> _WORD) | (d & _HIGH)


@exact
def untile(first, last, wide, tiles, of, far, near, across, natural):
    """Bands `first` to `last` of a matrix `wide` blocks wide.

    Block (i, j) is number i / of * far + i % of * near + j * across of those at `tiles`.
    """
    stride = wide * _BLOCK_ROW
    for band in range(first, last):
        source = tiles + (band // of * far + band % of * near) * BLOCK
        for j in range(wide):
            _put_block(source + j * across * BLOCK, natural + band * BAND * stride + j * _BLOCK_ROW, stride)


@exact
def _put_scales(band, groups, tiles, are_bytes, target):
    """The scales of a band, (16, groups), of 8 bits or of 16."""
    tile, part = band // _BANDS, band % _BANDS
    if are_bytes:  # four by four
        for g in range(groups // 4):
            lying = carray(at(tiles + (tile * (groups // 4) + g) * BLOCK), BLOCK // 4, np.uint32)
            for half in range(2):
                line = (2 * part + half) % 4 * 4 + part // 2
                for eighth in range(8):
                    place = target + (half * 8 + eighth) * groups + 4 * g
                    carray(at(place), 1, np.uint32)[0] = lying[eighth * 16 + line]
    else:
        ordered = carray(at(target), BAND * groups, np.uint16)
        for g in range(groups):
            lying = carray(at(tiles + (tile * groups + g) * 256 + part * 32), BAND, np.uint16)
            for pair in range(4):
                for i in range(2):
                    ordered[(pair * 2 + i) * groups + g] = lying[pair * 4 + i]
                    ordered[(pair * 2 + i + 8) * groups + g] = lying[pair * 4 + i + 2]


@exact
def untile_scales(first, last, groups, tiles, are_bytes, natural):
    """The scales of bands `first` to `last`."""
    size = 1 if are_bytes else 2
    for band in range(first, last):
        _put_scales(band, groups, tiles, are_bytes, natural + band * BAND * groups * size)


# ---------------------------------------------------------------------------------------------------------- unpacking


@exact
def nibbles(first, last, n, codes, kind, scales, scales_kind, group, row_scales, out, out_kind, out_scales):
    """compiled_rows.py's of the same name, of bands `first` to `last` of tiles. group: 64 with INT4, else 16."""
    groups, wide = n // group, n // _COLUMNS
    room_a, room_b = np.empty(BAND * groups, np.float32), np.empty(BAND * groups * 2, np.uint8)
    room_c, room_d = np.empty(_AT_ONCE * BLOCK, np.uint8), np.empty(_AT_ONCE * _BLOCK_ROW, np.float32)
    factors, lying, blocks, by_byte = room_a.ctypes.data, room_b.ctypes.data, room_c.ctypes.data, room_d.ctypes.data
    size = 1 if out_kind == CODES else 2 if out_kind == BFLOAT16 else 4
    for band in range(first, last):
        _put_scales(band, groups, scales, scales_kind == E4M3, lying)
        _to_factors(band, groups, lying, scales_kind, kind, row_scales, factors)
        if out_kind == CODES:
            _scale_rows(band, groups, factors, kind, out_scales)
        source = codes + (band // _BANDS * wide * _BANDS + band % _BANDS) * BLOCK
        for tile in range(0, wide, _AT_ONCE):
            count = min(_AT_ONCE, wide - tile)
            for j in range(count):
                _put_block(source + (tile + j) * _BANDS * BLOCK, blocks + j * _BLOCK_ROW, count * _BLOCK_ROW)
            for r in range(BAND):
                row = band * BAND + r
                packed, target = blocks + r * count * _BLOCK_ROW, out + (row * n + tile * _COLUMNS) * size
                of_groups = floats(factors + r * groups * 4, groups)[tile * _COLUMNS // group :]
                share = np.float32(1)
                if out_kind == CODES:
                    share = np.float32(1) / floats(out_scales, row + 1)[row]
                if kind == INT4:
                    for j in range(count):
                        place = target + j * _COLUMNS * size
                        _unpack_int4(packed + j * _BLOCK_ROW, of_groups[j], share, place, out_kind)
                else:
                    _spread(of_groups, share, count * _COLUMNS // group, by_byte)
                    _unpack_e2m1(packed, count * _BLOCK_ROW, by_byte, target, out_kind)


@exact
def _to_factors(band, groups, lying, scales_kind, kind, row_scales, factors):
    """What the codes of each row and group are multiplied by, (16, groups) float32."""
    unit = np.float32(1) if kind == INT4 else np.float32(0.5)
    for r in range(BAND):
        row, of_row = band * BAND + r, unit
        if row_scales != 0:
            of_row *= floats(row_scales, row + 1)[row]
        result = floats(factors + r * groups * 4, groups)
        if scales_kind == E4M3:
            narrow = carray(at(lying + r * groups), groups, np.uint8)
            for g in range(groups):
                result[g] = _e4m3(narrow[g]) * of_row
        else:
            wide = carray(at(lying + r * groups * 2), groups, np.uint16)
            if scales_kind == HALF:
                for g in range(groups):
                    result[g] = _half(np.int64(wide[g])) * of_row
            else:
                for g in range(groups):
                    result[g] = number(np.uint32(wide[g]) << _SIXTEEN) * of_row


@exact
def _scale_rows(band, groups, factors, kind, out_scales):
    """The scale of each row's int8 codes, by its largest factor as compiled_rows.py says."""
    for r in range(BAND):
        row, of_row = band * BAND + r, floats(factors + r * groups * 4, groups)
        most = np.uint32(0)
        for g in range(groups):
            most = max(most, bits_of(of_row[g]) & _MAGNITUDE)
        scale = number(most) * (_INT4_PER_CODE if kind == INT4 else _E2M1_PER_CODE)
        floats(out_scales, row + 1)[row] = max(scale, SMALLEST_SCALE)


@exact
def _int4(code):
    """Two's complement."""
    return number(code ^ _SIGNED_CODE) - _SIGN_AND_OFFSET


@exact
def _brain(x):
    """A float32's bits, rounded to bfloat16 in their upper half."""
    bits = bits_of(x)
    return bits + _BELOW_HALF + ((bits >> _SIXTEEN) & _ONE)


@exact
def _unpack_int4(source, factor, share, target, out_kind):
    """A block's row of 64 codes, times factor, and for int8 codes times share: two by two, as a byte holds them."""
    packed = carray(at(source), _BLOCK_ROW, np.uint8)
    if out_kind == CODES:
        codes = carray(at(target), _BLOCK_ROW, np.uint16)
        for i in range(_BLOCK_ROW):
            byte = np.uint32(packed[i])
            low = bits_of(_int4(byte & _FIFTEEN) * factor * share + _ROUNDING) & _BYTE
            high = bits_of(_int4(byte >> _FOUR) * factor * share + _ROUNDING) & _BYTE
            codes[i] = np.uint16(low | high << _EIGHT)
    elif out_kind == BFLOAT16:
        brains = carray(at(target), _BLOCK_ROW, np.uint32)
        for i in range(_BLOCK_ROW):
            byte = np.uint32(packed[i])
            low, high = _brain(_int4(byte & _FIFTEEN) * factor), _brain(_int4(byte >> _FOUR) * factor)
            brains[i] = low >> _SIXTEEN | high & _UPPER_HALF
    else:
        numbers = floats(target, _COLUMNS)
        for i in range(_BLOCK_ROW):
            byte = np.uint32(packed[i])
            numbers[2 * i] = _int4(byte & _FIFTEEN) * factor
            numbers[2 * i + 1] = _int4(byte >> _FOUR) * factor


@exact
def _spread(factors, share, groups, target):
    """Each group's factor, times share, for each of its bytes: loops as long as a group would hardly fill a vector."""
    by_byte = floats(target, groups * _E2M1_BYTES)
    for g in range(groups):
        factor = factors[g] * share
        for i in range(_E2M1_BYTES):
            by_byte[g * _E2M1_BYTES + i] = factor


@exact
def _unpack_e2m1(source, count, factors, target, out_kind):
    """So many bytes, two codes each, times a factor for each byte."""
    packed, of_byte = carray(at(source), count, np.uint8), floats(factors, count)
    if out_kind == CODES:
        codes = carray(at(target), count, np.uint16)
        for i in range(count):
            byte = np.uint32(packed[i])
            low = bits_of(_twice_e2m1(byte & _FIFTEEN) * of_byte[i] + _ROUNDING) & _BYTE
            high = bits_of(_twice_e2m1(byte >> _FOUR) * of_byte[i] + _ROUNDING) & _BYTE
            codes[i] = np.uint16(low | high << _EIGHT)
    elif out_kind == BFLOAT16:
        brains = carray(at(target), count, np.uint32)
        for i in range(count):
            byte = np.uint32(packed[i])
            low = _brain(_twice_e2m1(byte & _FIFTEEN) * of_byte[i])
            high = _brain(_twice_e2m1(byte >> _FOUR) * of_byte[i])
            brains[i] = low >> _SIXTEEN | high & _UPPER_HALF
    else:
        numbers = floats(target, 2 * count)
        for i in range(count):
            byte = np.uint32(packed[i])
            numbers[2 * i] = _twice_e2m1(byte & _FIFTEEN) * of_byte[i]
            numbers[2 * i + 1] = _twice_e2m1(byte >> _FOUR) * of_byte[i]

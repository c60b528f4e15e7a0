"""Packed rows unpacked by the CPU, compiled by numba: each row into float32 in the first cache, then out as asked.

Every kernel here unpacks rows `first` to `last` of n columns and hands them to compiled_kernels.py's write_row: as int8
codes with a scale for the row, as bfloat16, or as float32. What packed bytes mean is said in packings/*.py; only how to
unpack many at a time is said here: loops over bytes that LLVM turns into vector instructions, scales apart from codes.

`size` and `stride` in the names below are bytes. A new packing is one more kernel of this shape, and one more line in
compiled_expand.py.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from shared.ops.compiled_kernels import (
    CODES,
    LARGEST_CODE,
    SMALLEST_SCALE,
    at,
    bits_of,
    floats,
    kernel,
    number,
    write_row,
)

E4M3, E5M2, INT4 = 0, 1, 2  # kinds of codes
HALF, BRAIN = 3, 4  # scales in float16 and bfloat16

# A bare number in the code would make 64 bits of what it meets.
_ONE, _TWO, _THREE, _FOUR = (np.uint32(value) for value in (1, 2, 3, 4))
_SEVEN, _EIGHT, _FIFTEEN = (np.uint32(value) for value in (7, 8, 15))


@kernel
def _bytes(address, count):
    return carray(at(address), count, np.uint8)


@kernel
def _half(bits):
    """float16 as float32; infinity and NaN have been refused where the file was read."""
    sign, exponent, mantissa = (bits & 0x8000) << 16, (bits >> 10) & 31, bits & 0x3FF
    if exponent == 0:
        value = np.float32(mantissa) * np.float32(2.0**-24)
        return -value if sign else value
    return number(np.uint32(sign | ((exponent + 112) << 23) | (mantissa << 13)))


@kernel
def _half_at(data, place):
    return _half(np.int64(data[place]) | (np.int64(data[place + 1]) << 8))


@kernel
def _e4m3(code):
    """One E4M3 byte. Below 2^-6 the three last digits count steps of 2^-9."""
    bits = np.uint32(code)
    magnitude = bits & np.uint32(0x7F)
    value = number((magnitude << np.uint32(20)) + np.uint32(120 << 23))
    if magnitude < 8:
        value = np.float32(magnitude) * np.float32(2.0**-9)
    if magnitude == 0x7F:
        value = np.float32(np.nan)
    return -value if bits & np.uint32(0x80) else value


@kernel
def _e5m2(code):
    """One E5M2 byte: the upper half of a float16."""
    bits = np.uint32(code)
    magnitude = bits & np.uint32(0x7F)
    value = number((magnitude << np.uint32(21)) + np.uint32(112 << 23))
    if magnitude < 4:
        value = np.float32(magnitude) * np.float32(2.0**-16)
    if magnitude >= 0x7C:
        value = np.float32(np.inf) if magnitude == 0x7C else np.float32(np.nan)
    return -value if bits & np.uint32(0x80) else value


@kernel
def _twice_e2m1(code):
    """Two times an E2M1 code's number, a whole one: 0 1 2 3 4 6 8 12, the fourth bit being the sign.

    Exponent and digit, taken for float32's, are 2^E (1 + M / 2); with E = 0 no leading 1 is meant.
    """
    value = number(((code & _SEVEN) << np.uint32(22)) + np.uint32(127 << 23))
    if value < 2:
        value = np.float32(2) * (value - np.float32(1))
    return number(bits_of(value) | (code & _EIGHT) << np.uint32(28))


@kernel
def _int4(code):
    """Two's complement."""
    return np.float32(np.int32(code ^ _EIGHT) - np.int32(8))


@kernel
def _unswizzle(band, scales, r):
    """One-byte scales that lie swizzled (swizzle.py), of the 128 rows among which row r is: four at a time, in the
    order of memory, which takes half as long as to collect each row's own, four of every 512 bytes."""
    tiles = band.shape[1]
    lying = carray(at(scales + r // 128 * tiles * 512), (tiles, 32, 4), np.uint32)
    for t in range(tiles):
        for line in range(32):
            for part in range(4):
                band[line + 32 * part, t] = lying[t, line, part]


@kernel
def nibbles(
    first, last, n, codes, kind, high_first, scales, scales_kind, group, tiles, row_scales, out, out_kind, out_scales
):  # fmt: skip
    """Two codes in a byte, times a scale for each `group` columns, times one for the row.

    kind: INT4, anything else E2M1. high_first: whether the even column is in the byte's high half. scales_kind: E4M3,
    HALF or BRAIN. tiles: of swizzled E4M3 scales, side by side; 0 where the scales of a row lie together. row_scales:
    rows' float32, 0 for none.
    """
    row, groups = np.empty(n, np.float32), n // group
    factors, band = np.empty(groups, np.float32), np.empty((128, tiles), np.uint32)
    unit = np.float32(1) if kind == INT4 else np.float32(0.5)
    for r in range(first, last):
        packed = _bytes(codes + r * (n // 2), n // 2)
        if kind == INT4:
            for i in range(n // 2):
                byte = np.uint32(packed[i])
                low, high = _int4(byte & _FIFTEEN), _int4(byte >> _FOUR)
                row[2 * i] = high if high_first else low
                row[2 * i + 1] = low if high_first else high
        else:
            for i in range(n // 2):
                byte = np.uint32(packed[i])
                low, high = _twice_e2m1(byte & _FIFTEEN), _twice_e2m1(byte >> _FOUR)
                row[2 * i] = high if high_first else low
                row[2 * i + 1] = low if high_first else high
        of_row = unit * (floats(row_scales, r + 1)[r] if row_scales != 0 else np.float32(1))
        its_scales = scales + r * groups
        if tiles > 0:
            if r == first or r % 128 == 0:
                _unswizzle(band, scales, r)
            its_scales = band.ctypes.data + r % 128 * tiles * 4
        narrow = _bytes(its_scales, groups)
        wide = carray(at(scales + r * groups * 2), groups, np.uint16)
        for g in range(groups):
            if scales_kind == E4M3:
                scale = _e4m3(narrow[g])
            elif scales_kind == HALF:
                scale = _half(np.int64(wide[g]))
            else:
                scale = number(np.uint32(wide[g]) << np.uint32(16))
            factors[g] = scale * of_row
        if out_kind == CODES:
            _round_groups(row, factors, np.float32(8 if kind == INT4 else 12), out, r, out_scales)
            continue
        for g in range(groups):
            part, factor = row[g * group : (g + 1) * group], factors[g]
            for i in range(group):
                part[i] *= factor
        write_row(row, out_kind, out, r, out_scales)


@kernel
def _round_groups(row, factors, largest, out, r, out_scales):
    """Row r as int8 codes: numbers up to `largest`, times a factor for each group of them.

    The scale is by the largest factor, as if a number of that group took the largest value, which with blocks of 16 or
    64 one nearly always does: one pass less than to look for the largest product.
    """
    n, groups = len(row), len(factors)
    most = np.uint32(0)
    for g in range(groups):
        most = max(most, bits_of(factors[g]) & np.uint32(0x7FFFFFFF))
    scale = max(number(most) * largest / LARGEST_CODE, SMALLEST_SCALE)
    floats(out_scales, r + 1)[r] = scale
    codes = carray(at(out + r * n), n, np.int8)
    group = n // groups
    for g in range(groups):
        factor, part, result = factors[g] / scale, row[g * group : (g + 1) * group], codes[g * group : (g + 1) * group]
        for i in range(group):
            result[i] = np.int8(np.int32(np.rint(part[i] * factor)))


@kernel
def floats8(first, last, n, codes, kind, scales, groups, height, exponents, tiles, out, out_kind, out_scales):
    """8-bit floats (E4M3 or E5M2), times what their group of columns says.

    scales: float32 (rows / height, groups), 0 for none; height: how many rows share them. exponents: MXFP8's bytes
    (rows, groups) in the place of scales, 0 for none; tiles: of them where they lie swizzled, side by side, else 0.
    """
    row, band = np.empty(n, np.float32), np.empty((128, tiles), np.uint32)
    for r in range(first, last):
        its_scales = exponents + r * groups
        if tiles > 0:
            if r == first or r % 128 == 0:
                _unswizzle(band, exponents, r)
            its_scales = band.ctypes.data + r % 128 * tiles * 4
        packed = _bytes(codes + r * n, n)
        if kind == E4M3:
            for i in range(n):
                row[i] = _e4m3(packed[i])
        else:
            for i in range(n):
                row[i] = _e5m2(packed[i])
        if groups > 0:
            group = n // groups
            for g in range(groups):
                if exponents != 0:
                    scale = number(np.uint32(_bytes(its_scales, groups)[g]) << np.uint32(23))
                else:
                    scale = floats(scales, (r // height + 1) * groups)[r // height * groups + g]
                part = row[g * group : (g + 1) * group]
                for i in range(group):
                    part[i] *= scale
        write_row(row, out_kind, out, r, out_scales)


@kernel
def integers(first, last, n, codes, scales, groups, out, out_kind, out_scales):
    """int8 codes times a float32 scale for each of a row's groups of columns."""
    row, group = np.empty(n, np.float32), n // groups
    for r in range(first, last):
        packed = carray(at(codes + r * n), n, np.int8)
        of_row = floats(scales + r * groups * 4, groups)
        for g in range(groups):
            scale = of_row[g]
            for i in range(g * group, (g + 1) * group):
                row[i] = np.float32(packed[i]) * scale
        write_row(row, out_kind, out, r, out_scales)


@kernel
def tables(first, last, n, codes, table, magnitudes, groups, out, out_kind, out_scales):
    """Two codes in a byte, the even column's in its high half, for numbers of a table (float32, 16), times a float32
    magnitude for each of a row's groups of columns. Both numbers of a byte are looked up at once."""
    row, group = np.empty(n, np.float32), n // groups
    values, pairs = floats(table, 16), np.empty((256, 2), np.float32)
    for byte in range(256):
        pairs[byte, 0], pairs[byte, 1] = values[byte >> 4], values[byte & 15]
    both, pair_of = row.view(np.uint64), pairs.reshape(512).view(np.uint64)
    for r in range(first, last):
        packed = _bytes(codes + r * (n // 2), n // 2)
        for i in range(n // 2):
            both[i] = pair_of[packed[i]]
        of_row = floats(magnitudes + r * groups * 4, groups)
        for g in range(groups):
            part, magnitude = row[g * group : (g + 1) * group], of_row[g]
            for i in range(group):
                part[i] *= magnitude
        write_row(row, out_kind, out, r, out_scales)


# --------------------------------------------------------------------------------------------------- GGUF's blocks
#
# kernel(first, last, n, blocks, out, out_kind, out_scales). The layouts are drawn in packings/gguf.py.


@kernel
def q8_0(first, last, n, blocks, out, out_kind, out_scales):
    row, count = np.empty(n, np.float32), n // 32
    for r in range(first, last):
        data = _bytes(blocks + r * count * 34, count * 34)
        for b in range(count):
            scale = _half_at(data, b * 34)
            codes = carray(at(blocks + (r * count + b) * 34 + 2), 32, np.int8)
            numbers = row[b * 32 : b * 32 + 32]
            for i in range(32):
                numbers[i] = scale * np.float32(codes[i])
        write_row(row, out_kind, out, r, out_scales)


@kernel
def q4(first, last, n, blocks, has_minimum, out, out_kind, out_scales):
    """Q4_0; with a minimum Q4_1."""
    row, count, size = np.empty(n, np.float32), n // 32, 20 if has_minimum else 18
    for r in range(first, last):
        data = _bytes(blocks + r * count * size, count * size)
        for b in range(count):
            scale = _half_at(data, b * size)
            least = _half_at(data, b * size + 2) if has_minimum else scale * np.float32(-8)
            codes = data[b * size + size - 16 : b * size + size]
            low, high = row[b * 32 : b * 32 + 16], row[b * 32 + 16 : b * 32 + 32]
            for i in range(16):
                byte = np.uint32(codes[i])
                low[i] = scale * np.float32(np.int32(byte & _FIFTEEN)) + least
                high[i] = scale * np.float32(np.int32(byte >> _FOUR)) + least
        write_row(row, out_kind, out, r, out_scales)


@kernel
def q5(first, last, n, blocks, has_minimum, out, out_kind, out_scales):
    """Q5_0; with a minimum Q5_1."""
    row, count, size = np.empty(n, np.float32), n // 32, 24 if has_minimum else 22
    for r in range(first, last):
        data = _bytes(blocks + r * count * size, count * size)
        for b in range(count):
            scale = _half_at(data, b * size)
            least = _half_at(data, b * size + 2) if has_minimum else scale * np.float32(-16)
            place = b * size + size - 20
            fifth = (
                np.uint32(data[place]) | np.uint32(data[place + 1]) << np.uint32(8)
                | np.uint32(data[place + 2]) << np.uint32(16) | np.uint32(data[place + 3]) << np.uint32(24)
            )  # fmt: skip
            codes = data[place + 4 : place + 20]
            for i in range(16):
                low = np.uint32(codes[i] & 15) | ((fifth >> np.uint32(i)) & _ONE) << np.uint32(4)
                high = np.uint32(codes[i] >> 4) | ((fifth >> np.uint32(i + 16)) & _ONE) << np.uint32(4)
                row[b * 32 + i] = scale * np.float32(low) + least
                row[b * 32 + 16 + i] = scale * np.float32(high) + least
        write_row(row, out_kind, out, r, out_scales)


@kernel
def _six_bits(data, place, j):
    """Scale and minimum j of the twelve bytes at `place`."""
    if j < 4:
        return np.float32(data[place + j] & 63), np.float32(data[place + 4 + j] & 63)
    rest = data[place + 4 + j]
    scale = (rest & 15) | (data[place + j - 4] >> 6) << 4
    minimum = (rest >> 4) | (data[place + j] >> 6) << 4
    return np.float32(scale), np.float32(minimum)


@kernel
def q45_k(first, last, n, blocks, has_fifth, out, out_kind, out_scales):
    """Q4_K; with fifth bits Q5_K."""
    row, count, size = np.empty(n, np.float32), n // 256, 176 if has_fifth else 144
    for r in range(first, last):
        data = _bytes(blocks + r * count * size, count * size)
        for b in range(count):
            place = b * size
            scale, least = _half_at(data, place), _half_at(data, place + 2)
            bits = data[place + 16 : place + 48]
            codes = data[place + size - 128 : place + size]
            for pair in range(4):
                factor, minimum = _six_bits(data, place + 4, 2 * pair)
                factor2, minimum2 = _six_bits(data, place + 4, 2 * pair + 1)
                a, a2, m, m2 = scale * factor, scale * factor2, least * minimum, least * minimum2
                start, source = b * 256 + pair * 64, pair * 32
                if has_fifth:
                    shift = np.uint8(2 * pair)
                    for i in range(32):
                        two = bits[i] >> shift
                        row[start + i] = a * np.float32((codes[source + i] & 15) | (two & 1) << 4) - m
                        row[start + 32 + i] = a2 * np.float32((codes[source + i] >> 4) | (two & 2) << 3) - m2
                else:
                    for i in range(32):
                        row[start + i] = a * np.float32(codes[source + i] & 15) - m
                        row[start + 32 + i] = a2 * np.float32(codes[source + i] >> 4) - m2
        write_row(row, out_kind, out, r, out_scales)


@kernel
def q6_k(first, last, n, blocks, out, out_kind, out_scales):
    row, count = np.empty(n, np.float32), n // 256
    for r in range(first, last):
        data = _bytes(blocks + r * count * 210, count * 210)
        for b in range(count):
            place = b * 210
            scale = _half_at(data, place + 208)
            factors = carray(at(blocks + (r * count + b) * 210 + 192), 16, np.int8)
            for run in range(8):
                half, quarter = run // 4, run % 4
                source = place + half * 64 + quarter % 2 * 32
                low, high = data[source : source + 32], data[place + 128 + half * 32 : place + 160 + half * 32]
                shift, top = np.uint32(quarter // 2 * 4), np.uint32(2 * quarter)
                numbers = row[b * 256 + run * 32 : b * 256 + run * 32 + 32]
                for i in range(32):
                    code = np.uint32(low[i]) >> shift & _FIFTEEN | (np.uint32(high[i]) >> top & _THREE) << _FOUR
                    numbers[i] = np.float32(np.int32(code) - np.int32(32))
            for s in range(16):
                factor = scale * np.float32(factors[s])
                part = row[b * 256 + s * 16 : b * 256 + s * 16 + 16]
                for i in range(16):
                    part[i] *= factor
        write_row(row, out_kind, out, r, out_scales)


@kernel
def q3_k(first, last, n, blocks, out, out_kind, out_scales):
    row, count = np.empty(n, np.float32), n // 256
    for r in range(first, last):
        data = _bytes(blocks + r * count * 110, count * 110)
        for b in range(count):
            place = b * 110
            scale = _half_at(data, place + 108)
            thirds = data[place : place + 32]
            for run in range(8):
                codes = data[place + 32 + (run // 4) * 32 : place + 64 + (run // 4) * 32]
                shift, bit = np.uint32(2 * (run % 4)), np.uint32(run)
                numbers = row[b * 256 + run * 32 : b * 256 + run * 32 + 32]
                for i in range(32):
                    third = np.uint32(thirds[i]) >> bit & _ONE
                    code = np.uint32(codes[i]) >> shift & _THREE | third << _TWO
                    numbers[i] = np.float32(np.int32(code) - np.int32(4))
            for s in range(16):
                four = (np.int32(data[place + 96 + s % 8]) >> (4 if s >= 8 else 0)) & 15
                two = (np.int32(data[place + 104 + s % 4]) >> (2 * (s // 4))) & 3
                factor = scale * np.float32((four | two << 4) - 32)
                part = row[b * 256 + s * 16 : b * 256 + s * 16 + 16]
                for i in range(16):
                    part[i] *= factor
        write_row(row, out_kind, out, r, out_scales)


@kernel
def q2_k(first, last, n, blocks, out, out_kind, out_scales):
    row, count = np.empty(n, np.float32), n // 256
    for r in range(first, last):
        data = _bytes(blocks + r * count * 84, count * 84)
        for b in range(count):
            place = b * 84
            scale, least = _half_at(data, place + 80), _half_at(data, place + 82)
            for run in range(8):
                codes = data[place + 16 + (run // 4) * 32 : place + 48 + (run // 4) * 32]
                shift = np.uint32(2 * (run % 4))
                numbers = row[b * 256 + run * 32 : b * 256 + run * 32 + 32]
                for i in range(32):
                    numbers[i] = np.float32(np.int32(np.uint32(codes[i]) >> shift & _THREE))
            for s in range(16):
                both = data[place + s]
                factor, minimum = scale * np.float32(both & 15), least * np.float32(both >> 4)
                part = row[b * 256 + s * 16 : b * 256 + s * 16 + 16]
                for i in range(16):
                    part[i] = part[i] * factor - minimum
        write_row(row, out_kind, out, r, out_scales)

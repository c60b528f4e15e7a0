"""The CPU's kernels, compiled by numba for the very processor they run on: one pass over the activations each.

A kernel is a plain loop over rows `first` to `last` (one row is one token), of which LLVM makes vector instructions;
several threads take a share of the rows each. A row passes through three hands:

    read    from memory, whatever it holds there, into float32 numbers that stay in the core's first cache
    work    in float32
    write   to memory, rounded once to what is asked for

So every kernel knows every type, and each is compiled once: some seconds on the first day, after which numba finds the
result beside this file. Tensors come as addresses and kinds:

    FLOAT32   as it is            BFLOAT16  the upper half of a float32, written rounded to the nearest, halves to even
    SUMS      read only: int32 sums of int8 products, times a scale of the row; like any number that is read, also times
              a factor of its column where there is one
    CODES     written only: int8, round(x / scale), with scale = max|x| / 127 of the row written beside

Sums may be added in any order, but infinity and NaN mean what they do everywhere. The largest number of a row is found
by comparing bits as integers, among which NaN is the largest: a row with NaN gets the scale NaN and cannot hide it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

FLOAT32, BFLOAT16, SUMS, CODES = 0, 1, 2, 3

_HOW: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
    "error_model": "numpy",
    "nogil": True,
    "cache": True,
}
kernel = njit(**_HOW)

LARGEST_CODE = np.float32(127)
SMALLEST_SCALE = np.float32(np.finfo(np.float32).tiny)

# e^x = 2^(x / ln 2), and 2^x = 2^n 2^r, n = round(x), |r| <= 1/2: there the series of 2^r to its sixth power is exact
# to float32's rounding. The coefficients are (ln 2)^k / k!.
_PER_LN2, _LIMIT = np.float32(1 / math.log(2)), np.float32(126)
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 7))


# ------------------------------------------------------------------------------------------------------- memory


@intrinsic
def at(_typing: Any, _address: Any) -> Any:
    """An integer as the pointer it stands for."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def bits_of(_typing: Any, _number: Any) -> Any:
    """The 32 bits of a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def number(_typing: Any, _bits: Any) -> Any:
    """The float32 of 32 bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@kernel
def floats(address, count):
    return carray(at(address), count, np.float32)


@kernel
def read_row(row, kind, address, index, factor, columns):
    """Row `index` of the matrix at `address`, times `factor` and the columns' factors (an address, or 0)."""
    n = len(row)
    if kind == FLOAT32:
        source = carray(at(address + index * n * 4), n, np.float32)
        for i in range(n):
            row[i] = source[i]
    elif kind == BFLOAT16:
        halves = carray(at(address + index * n * 2), n, np.uint16)
        for i in range(n):
            row[i] = number(np.uint32(halves[i]) << np.uint32(16))
    else:
        sums = carray(at(address + index * n * 4), n, np.int32)
        for i in range(n):
            row[i] = np.float32(sums[i]) * factor
    if columns != 0:
        factors = floats(columns, n)
        for i in range(n):
            row[i] *= factors[i]


@kernel
def write_row(row, kind, address, index, scales):
    """The inverse; scales is the address of the rows' scales, for codes."""
    n = len(row)
    if kind == FLOAT32:
        target = carray(at(address + index * n * 4), n, np.float32)
        for i in range(n):
            target[i] = row[i]
    elif kind == BFLOAT16:
        halves = carray(at(address + index * n * 2), n, np.uint16)
        for i in range(n):
            bits = bits_of(row[i])
            halves[i] = np.uint16(
                (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            )
    else:
        codes = carray(at(address + index * n), n, np.int8)
        largest = np.uint32(0)
        for i in range(n):
            largest = max(largest, bits_of(row[i]) & np.uint32(0x7FFFFFFF))
        scale = number(largest) / LARGEST_CODE
        if scale < SMALLEST_SCALE:
            scale = SMALLEST_SCALE
        floats(scales, index + 1)[index] = scale
        for i in range(n):
            codes[i] = np.int8(np.int32(np.rint(row[i] / scale)))


@kernel
def _per_rms(row, eps):
    """1 / sqrt(mean(x^2) + eps)."""
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i] * row[i]
    return np.float32(1) / np.sqrt(total / np.float32(len(row)) + np.float32(eps))


@kernel
def _factor(kind, factors, index):
    """The scale of a row of sums."""
    return floats(factors, index + 1)[index] if kind == SUMS else np.float32(1)


# ------------------------------------------------------------------------------------------------------ kernels
#
# first, last: rows. n: columns. A matrix is an address and a kind, and where it may be sums the addresses of the rows'
# factors and of the columns'; where it may be codes that of their scales. What is not there is 0.


@kernel
def norm(first, last, n, x, x_kind, weight, out, out_kind, out_scales, eps):
    """x / rms(x) * weight."""
    row, weights = np.empty(n, np.float32), floats(weight, n)
    for r in range(first, last):
        read_row(row, x_kind, x, r, np.float32(1), 0)
        share = _per_rms(row, eps)
        for i in range(n):
            row[i] *= share * weights[i]
        write_row(row, out_kind, out, r, out_scales)


@kernel
def gate_residual_norm(
    first, last, n, x, x_kind, y, y_kind, y_factors, y_columns, weight, kept,
    next_weight, out, out_kind, out_scales, eps,
):  # fmt: skip
    """kept = x + y / rms(y) * weight, of x's kind; out = kept / rms(kept) * next_weight, unless out is 0."""
    stream, added, weights = np.empty(n, np.float32), np.empty(n, np.float32), floats(weight, n)
    next_weights = floats(next_weight, n)
    for r in range(first, last):
        read_row(stream, x_kind, x, r, np.float32(1), 0)
        read_row(added, y_kind, y, r, _factor(y_kind, y_factors, r), y_columns)
        share = _per_rms(added, eps)
        for i in range(n):
            stream[i] += added[i] * share * weights[i]
        write_row(stream, x_kind, kept, r, 0)
        if out != 0:
            share = _per_rms(stream, eps)
            for i in range(n):
                stream[i] *= share * next_weights[i]
            write_row(stream, out_kind, out, r, out_scales)


@kernel
def qk_norm_rope(
    first, last, heads, width, tokens, pictures, qkv, kind, factors, columns, weights, rope, rope_items,
    out, out_kind, by_token, eps,
):  # fmt: skip
    """Row r, token r % tokens of picture r // tokens, holds `heads` queries, keys and values of `width` numbers.

    weights: two rows of `width`. rope: `rope_items` pictures' tables (tokens, width / 2) of cosine and sine; 1 for all.
    out: (3, pictures, heads, tokens, width), queries first; (3, pictures, tokens, heads, width) if by_token.
    """
    row, half = np.empty(3 * heads * width, np.float32), width // 2
    for r in range(first, last):
        read_row(row, kind, qkv, r, _factor(kind, factors, r), columns)
        item, token = r // tokens, r % tokens
        turn = floats(rope + ((item if rope_items > 1 else 0) * tokens + token) * width * 4, width)
        for part in range(3):
            gains = floats(weights + (part % 2) * width * 4, width)
            for h in range(heads):
                head = row[(part * heads + h) * width : (part * heads + h + 1) * width]
                if part < 2:
                    share = _per_rms(head, eps)
                    for i in range(half):
                        a = head[2 * i] * share * gains[2 * i]
                        b = head[2 * i + 1] * share * gains[2 * i + 1]
                        head[2 * i] = a * turn[2 * i] - b * turn[2 * i + 1]
                        head[2 * i + 1] = a * turn[2 * i + 1] + b * turn[2 * i]
                place = token * heads + h if by_token else h * tokens + token
                write_row(head, out_kind, out, (part * pictures + item) * heads * tokens + place, 0)


@kernel
def _power(x):
    """2^x, for x held between -126 and 126."""
    if x > _LIMIT:
        x = _LIMIT
    if x < -_LIMIT:
        x = -_LIMIT
    whole = np.floor(x + np.float32(0.5))
    rest = x - whole
    power = _C6
    power = power * rest + _C5
    power = power * rest + _C4
    power = power * rest + _C3
    power = power * rest + _C2
    power = power * rest + _C1
    power = power * rest + np.float32(1)
    return power * number(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


@kernel
def swiglu(first, last, n, w13, kind, factors, columns, out, out_kind, out_scales):
    """silu(first n columns) * last n columns."""
    row = np.empty(2 * n, np.float32)
    gate, value = row[:n], row[n:]
    for r in range(first, last):
        read_row(row, kind, w13, r, _factor(kind, factors, r), columns)
        for i in range(n):
            gate[i] = gate[i] / (np.float32(1) + _power(gate[i] * -_PER_LN2)) * value[i]
        write_row(gate, out_kind, out, r, out_scales)


@kernel
def convert(first, last, n, x, kind, factors, columns, out, out_kind, out_scales):
    """x times its columns' factors in another kind: activations as codes, sums as numbers."""
    row = np.empty(n, np.float32)
    for r in range(first, last):
        read_row(row, kind, x, r, _factor(kind, factors, r), columns)
        write_row(row, out_kind, out, r, out_scales)

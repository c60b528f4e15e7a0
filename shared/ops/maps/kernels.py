"""The three operations as Triton kernels. fused.py launches them.

A program takes PIXELS whole pixels, as they lie one behind the other, and sums each group over them; the programs' sums
are added up outside, always in the same order. Everything is computed in float32, a norm's variance in float64.
No loops, so that every interpreter of Triton can run them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads the parameters itself: pointers, numbers, and constants of the compilation in capitals.

from __future__ import annotations

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]


@triton.jit
def settle(
    x, bias, skip, out, sums,
    pixels, width,
    HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, KEEP: tl.constexpr, DOUBLED: tl.constexpr,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """out = x + bias + skip of all pixels; sums: (programs, 2, GROUPS) float32. width: of out, in pixels."""
    program = tl.program_id(0).to(tl.int64)
    pixel = program * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    inside = (pixel < pixels)[:, None] & (channel >= 0)[None, :]
    at = pixel[:, None] * CHANNELS + channel[None, :]
    if DOUBLED:
        row = pixel // width
        column = pixel - row * width
        low, right = row % 2, column % 2
        place = (row // 2 + low) * (width // 2 + 1) + column // 2 + right
        begin = (place * 4 + low * 2 + right) * CHANNELS
        numbers = tl.load(x + begin[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        numbers = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        numbers = numbers + tl.load(bias + channel).to(tl.float32)[None, :]
    if HAS_SKIP:
        numbers = numbers + tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
    kept = numbers.to(out.dtype.element_ty)
    if KEEP:
        tl.store(out + at, kept, mask=inside)
    counted = tl.where(inside, kept.to(tl.float32), 0.0)
    group = tl.arange(0, GROUPS)
    total = tl.sum(tl.reshape(tl.sum(counted, axis=0), (GROUPS, CHANNELS // GROUPS)), axis=1)
    squares = tl.sum(tl.reshape(tl.sum(counted * counted, axis=0), (GROUPS, CHANNELS // GROUPS)), axis=1)
    tl.store(sums + program * 2 * GROUPS + group, total)
    tl.store(sums + program * 2 * GROUPS + GROUPS + group, squares)


@triton.jit
def factors(
    total, weight, bias, before, factor, summand,
    count, eps,
    HAS_BEFORE: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program. total: (2, GROUPS) float64, sums of `count` numbers each. factor, summand: (CHANNELS,) float32."""
    channel = tl.arange(0, CHANNELS)
    group = channel // (CHANNELS // GROUPS)
    mean = tl.load(total + group) / count
    variance = tl.maximum(tl.load(total + GROUPS + group) / count - mean * mean, 0.0)
    scale = tl.load(weight + channel).to(tl.float32) / tl.sqrt(variance.to(tl.float32) + eps)
    moved = -mean.to(tl.float32)
    if HAS_BEFORE:
        moved = moved + tl.load(before + channel).to(tl.float32)
    tl.store(factor + channel, scale)
    tl.store(summand + channel, tl.load(bias + channel).to(tl.float32) + scale * moved)


@triton.jit
def normalise(
    x, factor, summand, out,
    pixels,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """out = silu(x * factor + summand) of all pixels."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    inside = (pixel < pixels)[:, None] & (channel >= 0)[None, :]
    at = pixel[:, None] * CHANNELS + channel[None, :]
    numbers = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    numbers = numbers * tl.load(factor + channel)[None, :] + tl.load(summand + channel)[None, :]
    if SILU:
        small = tl.exp(-tl.abs(numbers))  # of the magnitude: it cannot overflow
        numbers = numbers * tl.where(numbers < 0, small, 1.0) / (1 + small)
    tl.store(out + at, numbers.to(out.dtype.element_ty), mask=inside)

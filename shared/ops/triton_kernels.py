"""The element-wise operations as Triton kernels: one pass over the memory each. fused.py launches them.

Every kernel computes in float32 and takes one program per token, so that a token's sum and its largest number are known
before it is written. EXACT rounds where eager.py's exact form does. ROUND is 0 for a result in the input's type, 1 for
int8 codes, 2 for E4M3 codes, with the token's scale beside them (rounding.py): the next linear reads half the bytes.

The same source runs on the interpreter (TRITON_INTERPRET=1), which is how the tests know its numbers without a GPU. The
interpreter loses the carry when a number rounds up to a power of two in E4M3, so it is asked for ROUND 3: rounding by
arithmetic first, which leaves the conversion nothing to round. A GPU's own conversion needs no such help.
Works from Triton 3.4 on; docs/kernels.md has the bytes each kernel moves.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads the parameters itself: pointers, numbers, and constants of the compilation in capitals.

from __future__ import annotations

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]


@triton.jit
def rms_norm_modulate(
    x, weight, scale, out, codes_scale,
    tokens_per_item, columns, eps, x_stride, scale_stride,
    HAS_SCALE: tl.constexpr, EXACT: tl.constexpr, ROUND: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = rms_norm(x) * weight * scale. x: (T, columns). scale: (items, columns), one row for tokens_per_item."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < columns
    numbers = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normed = _normalise(numbers, factor, columns, eps, x.dtype.element_ty, EXACT)
    if HAS_SCALE:
        modulation = tl.load(scale + row // tokens_per_item * scale_stride + at, mask=inside, other=0.0)
        normed = normed * modulation.to(tl.float32)
    store_row(out, codes_scale, row, at, inside, columns, normed.to(x.dtype.element_ty).to(tl.float32), ROUND)


@triton.jit
def gate_residual(
    x, y, gate, weight, out,
    tokens_per_item, columns, eps, x_stride, y_stride, gate_stride,
    HAS_GATE: tl.constexpr, EXACT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = x + gate * rms_norm(y) * weight. x, y, out: (T, columns). gate: (items, columns)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < columns
    stream = _gated(x, y, gate, weight, row, at, inside, tokens_per_item, columns, eps, x_stride, y_stride,
                    gate_stride, HAS_GATE, EXACT)  # fmt: skip
    tl.store(out + row * columns + at, stream.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_residual_norm(
    x, y, gate, weight, next_weight, next_scale, stream_out, out, codes_scale,
    tokens_per_item, columns, eps, x_stride, y_stride, gate_stride, scale_stride,
    HAS_GATE: tl.constexpr, HAS_SCALE: tl.constexpr, EXACT: tl.constexpr, ROUND: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """gate_residual and, while its result is in the registers, the next linear's rms_norm_modulate of it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < columns
    stream = _gated(x, y, gate, weight, row, at, inside, tokens_per_item, columns, eps, x_stride, y_stride,
                    gate_stride, HAS_GATE, EXACT)  # fmt: skip
    kept = stream.to(stream_out.dtype.element_ty)
    tl.store(stream_out + row * columns + at, kept, mask=inside)
    factor = tl.load(next_weight + at, mask=inside, other=0.0).to(tl.float32)
    normed = _normalise(kept.to(tl.float32), factor, columns, eps, x.dtype.element_ty, EXACT)
    if HAS_SCALE:
        modulation = tl.load(next_scale + row // tokens_per_item * scale_stride + at, mask=inside, other=0.0)
        normed = normed * modulation.to(tl.float32)
    store_row(out, codes_scale, row, at, inside, columns, normed.to(x.dtype.element_ty).to(tl.float32), ROUND)


@triton.jit
def qk_norm_rope(
    qkv, q_weight, k_weight, rope,
    tokens_per_item, heads, eps, rope_item_stride, rope_token_stride,
    EXACT: tl.constexpr, HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr,
):  # fmt: skip
    """Normalise each head of the queries (program axis 1: 0) or keys (1), turn its pairs, and write them back.

    qkv: (T, 3 * heads * HEAD_WIDTH), contiguous. HEADS: heads rounded up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    head = tl.arange(0, HEADS)
    column = tl.arange(0, HEAD_WIDTH)
    place = row * 3 * heads * HEAD_WIDTH + part * heads * HEAD_WIDTH + head[:, None] * HEAD_WIDTH + column[None, :]
    inside = (head < heads)[:, None] & (column >= 0)[None, :]
    numbers = tl.load(qkv + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(q_weight + column).to(tl.float32) if part == 0 else tl.load(k_weight + column).to(tl.float32)

    kind = qkv.dtype.element_ty
    normed = numbers * (1 / tl.sqrt(tl.sum(numbers * numbers, axis=1) / HEAD_WIDTH + eps))[:, None]
    if EXACT:
        normed = normed.to(kind).to(tl.float32)
    normed = normed * factor[None, :]
    if EXACT:
        normed = normed.to(kind).to(tl.float32)

    item = row // tokens_per_item
    token = row - item * tokens_per_item
    angles = tl.load(rope + item * rope_item_stride + token * rope_token_stride + column)
    cos, sin = tl.split(tl.reshape(angles, (HEAD_WIDTH // 2, 2)))
    even, odd = tl.split(tl.reshape(normed, (HEADS, HEAD_WIDTH // 2, 2)))
    turned = tl.join(even * cos[None, :] - odd * sin[None, :], even * sin[None, :] + odd * cos[None, :])
    tl.store(qkv + place, tl.reshape(turned, (HEADS, HEAD_WIDTH)).to(kind), mask=inside)


@triton.jit
def swiglu(w13, out, columns, WIDTH: tl.constexpr):
    """out = silu(first half) * second half. w13: (T, 2 * columns). Program axis 1: a stretch of WIDTH columns."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = at < columns
    tl.store(out + row * columns + at, _swiglu(w13, row, at, inside, columns), mask=inside)


@triton.jit
def swiglu_rounded(w13, codes, codes_scale, columns, ROUND: tl.constexpr, WIDTH: tl.constexpr):
    """As swiglu, a whole token in one program, in 8 bits."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < columns
    numbers = _swiglu(w13, row, at, inside, columns).to(tl.float32)
    store_row(codes, codes_scale, row, at, inside, columns, numbers, ROUND)


@triton.jit
def round_rows(
    x, smooth, codes, codes_scale, columns, x_stride, HAS_SMOOTH: tl.constexpr, ROUND: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Tokens x (T, columns), divided by smooth (columns,) where there is one, in 8 bits."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < columns
    numbers = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SMOOTH:
        numbers = numbers / tl.load(smooth + at, mask=inside, other=1.0).to(tl.float32)
    store_row(codes, codes_scale, row, at, inside, columns, numbers, ROUND)


# ------------------------------------------------------------------------------------------- parts of the kernels


@triton.jit
def _normalise(numbers, factor, columns, eps, kind: tl.constexpr, EXACT: tl.constexpr):
    """rms_norm(numbers) * factor of one token in float32, rounded to `kind` where EXACT says."""
    normed = numbers * (1 / tl.sqrt(tl.sum(numbers * numbers, axis=0) / columns + eps))
    if EXACT:
        return (normed.to(kind).to(tl.float32) * factor).to(kind).to(tl.float32)
    else:
        return normed * factor


@triton.jit
def _gated(
    x, y, gate, weight, row, at, inside, tokens_per_item, columns, eps, x_stride, y_stride, gate_stride,
    HAS_GATE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """x + gate * rms_norm(y) * weight of one token, float32."""
    kind: tl.constexpr = x.dtype.element_ty
    added = tl.load(y + row * y_stride + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normed = _normalise(added, factor, columns, eps, kind, EXACT)
    if HAS_GATE:
        normed = normed * tl.load(gate + row // tokens_per_item * gate_stride + at, mask=inside, other=0.0).to(
            tl.float32
        )
        if EXACT:
            normed = normed.to(kind).to(tl.float32)
    return tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32) + normed


@triton.jit
def _swiglu(w13, row, at, inside, columns):
    """silu(gate) * value in w13's type, rounded after silu too, as torch does."""
    kind: tl.constexpr = w13.dtype.element_ty
    gate = tl.load(w13 + row * 2 * columns + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(w13 + row * 2 * columns + columns + at, mask=inside, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # of the magnitude: it cannot overflow
    opened = (gate * tl.where(gate < 0, small, 1.0) / (1 + small)).to(kind).to(tl.float32)
    return (opened * value).to(kind)


@triton.jit
def store_row(out, codes_scale, row, at, inside, columns, numbers, ROUND: tl.constexpr):
    """Write one token: as it is (ROUND 0), or in 8 bits with its scale."""
    if ROUND == 0:
        tl.store(out + row * columns + at, numbers.to(out.dtype.element_ty), mask=inside)
    else:
        largest = tl.max(tl.where(inside, tl.abs(numbers), 0.0), axis=0)
        if ROUND == 1:
            scale = tl.maximum(largest / 127.0, 1.1754944e-38)  # the least normal float32: a token of zeros stays zeros
            # Adding and taking away 1.5 * 2**23 leaves the nearest integer, halves to even.
            whole = (numbers / scale + 12582912.0) - 12582912.0
            tl.store(out + row * columns + at, whole.to(tl.int8), mask=inside)
        else:
            scale = tl.maximum(largest / 448.0, 1.1754944e-38)
            # Division rounds: just above 448 would saturate anyway, on every device alike when it is said here.
            fitted = tl.minimum(tl.maximum(numbers / scale, -448.0), 448.0)
            if ROUND == 3:
                fitted = _nearest_e4m3(fitted)
            tl.store(out + row * columns + at, fitted.to(tl.float8e4nv), mask=inside)
        tl.store(codes_scale + row, scale)


@triton.jit
def _nearest_e4m3(numbers):
    """The nearest numbers that E4M3 has, halves to even, of float32 numbers up to 448."""
    bits = numbers.to(tl.int32, bitcast=True)
    cut = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # keeps 3 of 23 bits of the significand
    small = (numbers + 24576.0) - 24576.0  # below 2**-6 the numbers are 2**-9 apart: 1.5 * 2**14 has that last place
    return tl.where(tl.abs(numbers) < 0.015625, small, cut.to(tl.float32, bitcast=True))

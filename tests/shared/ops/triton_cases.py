"""The Triton kernels against their eager twins. Run by test_fused.py: in a process of its own, on Triton's interpreter
(TRITON_INTERPRET=1 has to be set before Triton is imported), and on the GPU itself where there is one.

Tolerances: the interpreter cuts bfloat16 off where hardware rounds to the nearest, which is one unit in the last place
instead of a half; sums of a row run in another order than torch's.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from shared.ops import eager, fused, triton_ready
from shared.ops.rounding import Kind, Rounded, round_rows

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Batch, tokens, width, below, at and above powers of two; factors for no, all or each item of the batch.
CASES = (((1, 1, 64), "one"), ((2, 5, 96), "none"), ((3, 4, 257), "each"), ((2, 3, 96), "one"))

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_case = pytest.mark.parametrize(("shape", "rows"), CASES, ids=str)
exact_or_not = pytest.mark.parametrize("exact", [False, True])


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0, spread: bool = True) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if spread and len(shape) > 1:  # tokens of very different size
        x = x * torch.logspace(-2, 2, shape[-2])[:, None]
    return x.to(DEVICE, dtype)


def units(dtype: torch.dtype, count: float) -> dict[str, float]:
    """Tolerances of `count` units in the last place, for rounding differences that add up in a few operations."""
    relative = {torch.float32: 1e-5, torch.bfloat16: 2**-7 * count, torch.float16: 2**-10 * count}[dtype]
    return {"rtol": relative, "atol": relative * 1e-2}


def assert_same_rounded(got: Rounded, expected: Rounded) -> None:
    """Codes next to each other at most: the numbers before rounding differ in their last place."""
    assert got.codes.shape == expected.codes.shape and got.codes.dtype == expected.codes.dtype
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.scale, expected.scale, rtol=2**-6 if got.dtype != torch.float32 else 1e-5, atol=0)
    step = expected.scale if got.kind == "int8" else (expected.restore().float().abs().flatten(0, -2) * 2**-3)
    floor = expected.scale * (1 if got.kind == "int8" else 2**-6)
    difference = (got.restore().float() - expected.restore().float()).abs().flatten(0, -2)
    assert bool((difference <= torch.maximum(step, floor) * 1.02).all())
    norm = expected.restore().float().norm()
    # A kernel that always rounded down would be twice as far off as this.
    assert float(difference.norm() / norm) < (0.012 if got.kind == "int8" else 0.05)


@each_dtype
@each_case
@exact_or_not
def test_rms_norm_modulate(dtype: torch.dtype, shape: tuple[int, int, int], exact: bool, rows: str) -> None:
    x, weight = numbers(*shape, dtype=dtype), numbers(shape[2], dtype=dtype, seed=1)
    scale = None if rows == "none" else numbers(shape[0] if rows == "each" else 1, 1, shape[2], dtype=dtype, seed=2)

    got = fused.rms_norm_modulate(x, weight, scale, EPS, exact=exact)

    expected = eager.rms_norm_modulate(x, weight, scale, EPS, exact=exact)
    torch.testing.assert_close(got, expected, **units(dtype, 3))


def test_rows_apart_in_memory_are_read_where_they_are() -> None:
    wide = numbers(2, 6, 2 * 96, dtype=torch.float32)
    x, weight = wide[:, :, :96], numbers(96, dtype=torch.float32, seed=1)
    scales = numbers(2, 1, 4 * 96, dtype=torch.float32, seed=2)
    scale, gate = scales.chunk(4, dim=-1)[1:3]

    torch.testing.assert_close(
        fused.rms_norm_modulate(x, weight, scale, EPS), eager.rms_norm_modulate(x, weight, scale, EPS)
    )
    torch.testing.assert_close(
        fused.gate_residual(x[:, 1:], x[:, :-1], gate, weight, EPS),
        eager.gate_residual(x[:, 1:], x[:, :-1], gate, weight, EPS),
    )


@each_dtype
@each_case
@exact_or_not
def test_gate_residual(dtype: torch.dtype, shape: tuple[int, int, int], exact: bool, rows: str) -> None:
    x, y, weight = (numbers(*s, dtype=dtype, seed=i) for i, s in enumerate((shape, shape, shape[2:])))
    gate = None if rows == "none" else numbers(shape[0] if rows == "each" else 1, 1, shape[2], dtype=dtype, seed=4)
    before = x.clone()

    got = fused.gate_residual(x, y, gate, weight, EPS, exact=exact)

    expected = eager.gate_residual(x, y, gate, weight, EPS, exact=exact)
    # Where the two addends cancel, what is left of the larger one's rounding: they are of the order of 1.
    torch.testing.assert_close(got, expected, rtol=units(dtype, 3)["rtol"], atol=units(dtype, 3)["rtol"])
    assert torch.equal(x, before)


@each_dtype
@pytest.mark.parametrize("modulated", [False, True])
def test_gate_residual_norm_is_both_operations_in_one(dtype: torch.dtype, modulated: bool) -> None:
    x, y = numbers(2, 5, 96, dtype=dtype), numbers(2, 5, 96, dtype=dtype, seed=1)
    weight, following = numbers(96, dtype=dtype, seed=2), numbers(96, dtype=dtype, seed=3)
    gate = numbers(1, 1, 96, dtype=dtype, seed=4) if modulated else None
    scale = numbers(2, 1, 96, dtype=dtype, seed=5) if modulated else None

    kept, normed = fused.gate_residual_norm(x, y, gate, weight, following, scale, EPS)

    stream = fused.gate_residual(x, y, gate, weight, EPS)
    assert torch.equal(kept, stream)
    assert isinstance(normed, Tensor)
    assert torch.equal(normed, fused.rms_norm_modulate(stream, following, scale, EPS))


@each_dtype
@exact_or_not
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (3, 32), (5, 128)])
@pytest.mark.parametrize("items", [1, 2])
def test_qk_norm_rope(dtype: torch.dtype, exact: bool, heads: int, width: int, items: int) -> None:
    batch, length = 2, 3
    qkv = numbers(batch, length, 3 * heads * width, dtype=dtype)
    weights = numbers(2, width, dtype=dtype, seed=1)
    angles = numbers(items, length + 2, 1, width // 2, dtype=torch.float32, seed=3)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)[:, :length]  # a part of a longer table
    expected = eager.qk_norm_rope(qkv.clone(), weights, rope, heads, EPS, exact=exact)

    got = fused.qk_norm_rope(qkv, weights, rope, heads, EPS, exact=exact)

    for mine, theirs in zip(got, (wide.to(dtype) for wide in expected), strict=True):
        assert mine.shape == theirs.shape == (batch, heads, length, width)
        # A turned number is the difference of two: its error is that of the larger.
        torch.testing.assert_close(
            mine, theirs, rtol=units(dtype, 3)["rtol"], atol=units(dtype, 2)["rtol"] * float(theirs.abs().max())
        )
    assert got[2].data_ptr() == qkv[..., 2 * heads * width :].data_ptr()


def test_a_head_that_is_no_power_of_two_is_left_to_torch() -> None:
    qkv, weights = numbers(1, 4, 3 * 2 * 24, dtype=torch.float32), numbers(2, 24, dtype=torch.float32, seed=1)
    angles = numbers(1, 4, 1, 12, dtype=torch.float32, seed=2)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)

    got = fused.qk_norm_rope(qkv, weights, rope, 2, EPS)

    for mine, theirs in zip(got, eager.qk_norm_rope(qkv, weights, rope, 2, EPS), strict=True):
        assert torch.equal(mine, theirs)


@each_dtype
@pytest.mark.parametrize("width", [1, 96, 1024, 1500])
def test_swiglu(dtype: torch.dtype, width: int) -> None:
    w13 = numbers(2, 3, 2 * width, dtype=dtype, spread=False) * 4

    torch.testing.assert_close(fused.swiglu(w13), eager.swiglu(w13), **units(dtype, 3))


@each_dtype
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_round_rows(dtype: torch.dtype, kind: Kind) -> None:
    x = numbers(2, 3, 100, dtype=dtype)
    x[1, 2] = 0

    assert_same_rounded(fused.round_rows(x, kind), round_rows(x, kind))
    assert not fused.round_rows(x, kind).codes[1, 2].float().any()


def test_round_rows_divides_by_the_smoothing_first() -> None:
    x, smooth = numbers(5, 96, dtype=torch.float32), numbers(96, dtype=torch.float32, seed=1).abs() + 0.5

    assert_same_rounded(fused.round_rows(x, "int8", smooth), round_rows(x / smooth, "int8"))


@each_dtype
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounding_in_the_producer_is_rounding_behind_it(dtype: torch.dtype, kind: Kind) -> None:
    x, y = numbers(2, 2, 96, dtype=dtype), numbers(2, 2, 96, dtype=dtype, seed=1)
    weight, scale = numbers(96, dtype=dtype, seed=2), numbers(2, 1, 96, dtype=dtype, seed=3)

    pairs = (
        (fused.rms_norm_modulate(x, weight, scale, EPS, rounding=kind), fused.rms_norm_modulate(x, weight, scale, EPS)),
        (fused.swiglu(x, rounding=kind), fused.swiglu(x)),
        (
            fused.gate_residual_norm(x, y, scale, weight, weight, scale, EPS, rounding=kind)[1],
            fused.gate_residual_norm(x, y, scale, weight, weight, scale, EPS)[1],
        ),
    )

    for rounded, plain in pairs:
        assert isinstance(rounded, Rounded) and isinstance(plain, Tensor)
        behind = fused.round_rows(plain, kind)
        assert torch.equal(rounded.codes.view(torch.uint8), behind.codes.view(torch.uint8))
        assert torch.equal(rounded.scale, behind.scale) and rounded.dtype == dtype


def test_what_is_tried_on_a_card_before_it_is_used_finds_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.wrong_operations(torch.device(DEVICE)) == []
    monkeypatch.setattr(fused, "swiglu", lambda w13: eager.swiglu(w13) * 1.1)
    assert fused.wrong_operations(torch.device(DEVICE)) == ["swiglu"]


def test_what_triton_raises_is_a_runtime_error_outside() -> None:
    from triton.errors import TritonError

    with pytest.raises(RuntimeError, match="Triton: out of resource"), triton_ready.launching():
        raise TritonError("out of resource")

"""The compiled kernels give what eager.py means, and hand over to it what they do not take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from shared import ops
from shared.ops import Rounded, Sums, compiled, compiled_ready, eager, round_rows
from shared.quant.linear import PackedLinear
from shared.quant.packings import int8
from tests.support.tiny_model import relative_error

B, S, H, E = 2, 5, 3, 16
D = H * E
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Up to the order of sums in float32, up to a rounding more or less in bfloat16."""
    return got.dtype == dtype and relative_error(got, expected) < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]


def sums_of(shape: tuple[int, ...], dtype: torch.dtype) -> Sums:
    tokens, columns = torch.Size(shape[:-1]).numel(), shape[-1]
    whole = torch.randint(-30000, 30000, (tokens, columns), dtype=torch.int32)
    return Sums(whole, torch.rand(tokens, 1) * 1e-2, torch.rand(columns, 1) * 1e-2, torch.Size(shape), dtype)


def test_they_run_here() -> None:
    assert compiled_ready.why_not() is None
    assert ops.implementation(torch.zeros(1)) is compiled
    assert compiled.wrong_operations() == []


@pytest.mark.parametrize("stream", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_residuals_are_eagers(stream: torch.dtype, dtype: torch.dtype) -> None:
    x, y = torch.randn(B, S, D).to(stream), torch.randn(B, S, D).to(dtype)
    weight, following = torch.randn(D), torch.randn(D)

    normed = compiled.rms_norm_modulate(x, weight, None, EPS, dtype=dtype)
    kept, behind = compiled.gate_residual_norm(x, y, None, weight, following, None, EPS, dtype=dtype)

    assert isinstance(normed, Tensor) and isinstance(behind, Tensor)
    assert close(normed, eager.rms_norm_modulate(x, weight, None, EPS, dtype=dtype), dtype)
    stream_after = eager.gate_residual(x, y, None, weight, EPS)
    assert close(kept, stream_after, stream)
    assert torch.equal(kept, compiled.gate_residual(x, y, None, weight, EPS))
    expected = eager.rms_norm_modulate(stream_after, following, None, EPS, dtype=dtype)  # of a stream that was rounded
    assert behind.dtype == dtype and relative_error(behind, expected) < (1e-6 if dtype == stream == DTYPES[0] else 4e-3)


@pytest.mark.parametrize("rope_items", [1, B])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [S, eager.SHORT])
def test_queries_and_keys_are_normalised_and_turned(dtype: torch.dtype, tokens: int, rope_items: int) -> None:
    qkv, weight = torch.randn(B, tokens, 3 * D).to(dtype), torch.randn(2, E)
    angles = torch.randn(rope_items, tokens, 1, E // 2)
    rope = torch.polar(torch.ones_like(angles), angles)

    found = compiled.qk_norm_rope(qkv, weight, rope, H, EPS)

    for got, expected in zip(found, eager.qk_norm_rope(qkv.clone(), weight, rope, H, EPS), strict=True):
        assert got.shape == (B, H, tokens, E)
        assert close(got, expected, expected.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_is_eagers_from_the_smallest_to_the_largest_numbers(dtype: torch.dtype) -> None:
    w13 = torch.cat([torch.linspace(-120, 120, 512), torch.randn(512)]).view(1, 1, -1).to(dtype)

    found, expected = compiled.swiglu(w13), eager.swiglu(w13)

    assert isinstance(found, Tensor) and found.dtype == dtype
    # Below -87 silu is 0 to 36 digits, here and there.
    torch.testing.assert_close(found, expected, rtol=5e-6 if dtype == torch.float32 else 1e-2, atol=1e-20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_come_as_codes_where_the_next_linear_multiplies_8_bits(dtype: torch.dtype) -> None:
    x, weight = torch.randn(B, S, D).to(dtype), torch.randn(D)
    x[0, 1] = 0

    for got, numbers in (
        (compiled.rms_norm_modulate(x, weight, None, EPS, rounding="int8"), None),
        (compiled.gate_residual_norm(x, x, None, weight, weight, None, EPS, rounding="int8")[1], None),
        (compiled.swiglu(x, rounding="int8"), eager.swiglu(x.float())),
        (compiled.round_rows(x), x),
    ):
        assert isinstance(got, Rounded) and got.kind == "int8" and got.dtype == dtype
        assert not got.codes[0, 1].any() and bool((got.scale > 0).all())
        assert int(got.codes.abs().max()) == 127
        if numbers is not None:
            expected = round_rows(numbers, "int8")
            assert (got.codes.int() - expected.codes.int()).abs().max() <= (dtype == torch.bfloat16)
            torch.testing.assert_close(
                got.scale, expected.scale, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_scaled_by_the_operation_that_follows(dtype: torch.dtype) -> None:
    x, weight, heads = torch.randn(B, S, D), torch.randn(D), torch.randn(2, E)
    angles = torch.randn(1, S, 1, E // 2)
    rope = torch.polar(torch.ones_like(angles), angles)
    added, qkv, w13 = sums_of((B, S, D), dtype), sums_of((B, S, 3 * D), dtype), sums_of((B, S, 2 * D), dtype)

    def numbers(sums: Sums) -> Tensor:
        return (sums.sums * sums.row * sums.column.t()).view(sums.shape)

    assert close(compiled.scaled(added), numbers(added), dtype)
    stream, opened = compiled.gate_residual(x, added, None, weight, EPS), compiled.swiglu(w13)
    assert close(stream, eager.gate_residual(x, numbers(added), None, weight, EPS), torch.float32)
    assert isinstance(opened, Tensor) and close(opened, eager.swiglu(numbers(w13)), dtype)
    expected = eager.qk_norm_rope(numbers(qkv), heads, rope, H, EPS)
    for got, one in zip(compiled.qk_norm_rope(qkv, heads, rope, H, EPS), expected, strict=True):
        assert close(got, one, torch.float32)


def test_nan_shows_in_codes() -> None:
    x = torch.randn(1, 3, D)
    x[0, 1, 7] = torch.nan

    rounded = compiled.round_rows(x)

    assert rounded.scale.isnan().flatten().tolist() == [False, True, False]


def test_several_threads_give_the_same_bits() -> None:
    x, weight = torch.randn(1, 701, 256), torch.randn(256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = compiled.rms_norm_modulate(x, weight, None, EPS, rounding="int8")
        torch.set_num_threads(3)
        found = compiled.rms_norm_modulate(x, weight, None, EPS, rounding="int8")
    finally:
        torch.set_num_threads(before)

    assert isinstance(expected, Rounded) and isinstance(found, Rounded)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize(("rows", "shares"), [(100, 1), (512, 2), (700, 2), (1024, 4), (10_000, 16)])
def test_no_thread_is_woken_for_little(rows: int, shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, int]] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)

    compiled.over_rows(lambda first, last, columns: taken.append((first, last)), rows, 256)

    assert len(taken) == shares
    assert sorted(taken)[0][0] == 0
    assert sorted(taken)[-1][1] == rows
    assert sum(last - first for first, last in taken) == rows


def test_what_they_do_not_take_is_eagers_to_the_bit() -> None:
    x, y, weight = torch.randn(B, S, D), torch.randn(B, S, D), torch.randn(D)
    factor = torch.rand(B, 1, D)
    turned = torch.randn(B, D, S).transpose(1, 2)
    half = x.half()
    pairs = [
        (compiled.rms_norm_modulate(x, weight, factor, EPS), eager.rms_norm_modulate(x, weight, factor, EPS)),
        (compiled.rms_norm_modulate(turned, weight, None, EPS), eager.rms_norm_modulate(turned, weight, None, EPS)),
        (compiled.rms_norm_modulate(half, weight, None, EPS), eager.rms_norm_modulate(half, weight, None, EPS)),
        (compiled.gate_residual(x, y, factor, weight, EPS), eager.gate_residual(x, y, factor, weight, EPS)),
        (
            compiled.gate_residual(x, y, None, weight, EPS, exact=True),
            eager.gate_residual(x, y, None, weight, EPS, exact=True),
        ),
        (compiled.swiglu(half), eager.swiglu(half)),
    ]
    for got, expected in pairs:
        assert isinstance(got, Tensor) and torch.equal(got, expected)


def test_gradients_are_eagers() -> None:
    with torch.enable_grad():
        assert ops.implementation(torch.zeros(1)) is eager


def test_without_numba_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled_ready.SWITCH, "0")
    assert compiled_ready.why_not.__wrapped__() == "turned off by ZIMAGE_NUMBA=0"
    monkeypatch.delenv(compiled_ready.SWITCH)
    monkeypatch.setattr(compiled, "wrong_operations", lambda: ["swiglu"])
    assert compiled_ready.why_not.__wrapped__() == "numba gives wrong numbers here: swiglu"

    def fail() -> list[str]:
        raise RuntimeError("no locator available\nfor file")

    monkeypatch.setattr(compiled, "wrong_operations", fail)
    assert compiled_ready.why_not.__wrapped__() == "numba does not work here (no locator available)"


def test_an_int8_linear_hands_its_sums_on() -> None:
    codes, scale = int8.quantize(torch.randn(D, D))
    layer = PackedLinear(int8.pack(codes, scale), None, torch.bfloat16, compute="int8")
    x = torch.randn(1, S, D).bfloat16()

    unscaled = layer.unscaled(x)

    assert layer.takes(torch.device("cpu")) == "int8"
    assert isinstance(unscaled, Sums)
    assert torch.equal(compiled.scaled(unscaled), layer(x))
    assert torch.equal(layer(compiled.round_rows(x)), layer(x))
    biased = PackedLinear(int8.pack(codes, scale), torch.ones(D).bfloat16(), torch.bfloat16, compute="int8")
    assert isinstance(biased.unscaled(x), Tensor)


def test_the_linear_that_follows_is_asked_what_it_takes() -> None:
    x, weight = torch.randn(1, S, D), torch.randn(D)
    narrow = nn.Linear(D, D).bfloat16()

    into = ops.rms_norm_modulate_into(narrow, x, weight, None, EPS)

    assert isinstance(into, Tensor) and into.dtype == torch.bfloat16

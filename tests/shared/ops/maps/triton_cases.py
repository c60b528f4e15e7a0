"""The kernels of maps against their eager twins. Run by test_maps.py, on Triton's interpreter, and on a GPU itself.

Tolerances: the interpreter cuts bfloat16 off where hardware rounds to the nearest.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from shared.ops import maps, triton_ready
from shared.ops.maps import eager, fused

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.bfloat16)
UNIT = {torch.float32: 1e-6, torch.bfloat16: 2**-7}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_same_sums(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Squares to the unit; sums, in which numbers cancel, to that of what was summed up."""
    total, exact = got.double().sum(0), expected.double().sum(0)
    torch.testing.assert_close(total[1], exact[1], rtol=2 * UNIT[dtype], atol=0)
    assert bool(((total[0] - exact[0]).abs() <= 2 * UNIT[dtype] * 40 * exact[1].sqrt()).all())


@each_dtype
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize(("channels", "groups"), [(4, 4), (16, 4), (512, 32), (24, 4)])
@pytest.mark.parametrize("has", ["nothing", "bias", "both"])
def test_settle(dtype: torch.dtype, doubled: bool, channels: int, groups: int, has: str) -> None:
    height, width = 6, 10
    x = numbers(*((4, 6, 4 * channels) if doubled else (height, width, channels)), dtype=dtype)
    bias = None if has == "nothing" else numbers(channels, seed=1)
    skip = numbers(height, width, channels, dtype=dtype, seed=2) if has == "both" else None
    out, expected = (torch.empty(height, width, channels, dtype=dtype, device=DEVICE) for _ in range(2))

    sums = fused.settle(x, bias=bias, skip=skip, out=out, groups=groups, doubled=doubled)

    exact = eager.settle(x, bias=bias, skip=skip, out=expected, groups=groups, doubled=doubled)
    torch.testing.assert_close(out, expected, rtol=UNIT[dtype], atol=UNIT[dtype])
    assert_same_sums(sums, exact, dtype)
    alone = fused.settle(x, bias=bias, skip=skip, out=None, groups=groups, doubled=doubled)
    assert torch.equal(alone, sums), "the sums are those of what would be written"


def test_settling_over_what_is_read() -> None:
    x, skip = numbers(6, 10, 16), numbers(6, 10, 16, seed=2)
    expected = x + skip

    fused.settle(x, bias=None, skip=skip, out=skip, groups=4)

    torch.testing.assert_close(skip, expected)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("has_before", [False, True])
def test_factors(parts: int, has_before: bool) -> None:
    x = numbers(6, 10, 16) + 3
    weight, bias, before = numbers(16, seed=1), numbers(16, seed=2), numbers(16, seed=3) if has_before else None
    sums = [fused.settle(band, bias=before, skip=None, out=None, groups=4) for band in x.chunk(parts)]

    factor, summand = fused.factors(sums, 60, weight, bias, 1e-6, before)

    whole = x if before is None else x + before
    expected = torch.nn.functional.group_norm(whole.permute(2, 0, 1)[None], 4, weight, bias, 1e-6)[0].permute(1, 2, 0)
    torch.testing.assert_close(x * factor + summand, expected, rtol=1e-4, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels", [4, 512, 24])
def test_normalise(dtype: torch.dtype, silu: bool, channels: int) -> None:
    x = numbers(5, 7, channels, dtype=dtype) * 30  # SiLU of large negative numbers among them
    factor, summand = numbers(channels, seed=1), numbers(channels, seed=2)
    out, expected = (torch.empty_like(x) for _ in range(2))

    fused.normalise(x, factor, summand, out, silu=silu)

    eager.normalise(x, factor, summand, expected, silu=silu)
    torch.testing.assert_close(out, expected, rtol=2 * UNIT[dtype], atol=1e-5)


def test_what_is_tried_on_a_card_finds_nothing_wrong_and_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.wrong_operations(torch.device(DEVICE)) == []
    monkeypatch.setattr(fused, "normalise", lambda x, factor, summand, out: out.zero_())
    assert fused.wrong_operations(torch.device(DEVICE)) == ["normalise"]
    monkeypatch.setattr(triton_ready, "why_not", lambda _device: None)
    maps._tried.cache_clear()
    try:
        assert maps._tried(torch.device(DEVICE)) is eager
    finally:
        maps._tried.cache_clear()

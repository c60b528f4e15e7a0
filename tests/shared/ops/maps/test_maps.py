"""The operations between a decoder's convolutions against torch's own norm, and Triton's against these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from shared.ops import maps, triton_ready
from shared.ops.maps import eager
from tests.support.triton_process import needs_triton, run_interpreted


def image(x: torch.Tensor) -> torch.Tensor:
    return x[None].permute(0, 3, 1, 2)


@pytest.mark.parametrize("at_once", [2**21, 1])
def test_bands_add_up_to_torch_s_norm(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(eager, "_AT_ONCE", at_once)
    x = torch.randn(9, 5, 12) + 4
    weight, bias, before = torch.randn(3, 12).unbind()
    normed = torch.empty_like(x)

    sums = [eager.settle(band, bias=before, skip=None, out=None, groups=3) for band in x.split(4)]
    factor, summand = eager.factors(sums, 45, weight, bias, 1e-6, before)
    eager.normalise(x, factor, summand, normed)

    expected = F.silu(F.group_norm(image(x + before), 3, weight, bias, 1e-6))
    torch.testing.assert_close(image(normed), expected, rtol=1e-4, atol=1e-5)


def test_a_skip_connection_is_added_where_it_lies() -> None:
    x, skip, bias = torch.randn(4, 5, 8), torch.randn(4, 5, 8), torch.randn(8)
    expected = x + skip + bias

    eager.settle(x, bias=bias, skip=skip, out=skip, groups=2)

    torch.testing.assert_close(skip, expected)


def test_a_cpu_is_served_by_torch_and_so_is_a_card_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ready, "why_not", lambda _device: "there is none")

    assert maps.implementation(torch.device("cpu")) is eager
    assert maps.implementation(torch.device("cuda", 0)) is eager


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_agree_with_their_eager_twins_on_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("triton_cases.py"))

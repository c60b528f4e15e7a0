"""Tokens in 8 bits: each by its own largest number, to the nearest code."""

from __future__ import annotations

import pytest
import torch

from shared.ops.rounding import Kind, round_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.012), ("fp8", 0.03)])
def test_tokens_come_back_as_near_as_8_bits_allow(kind: Kind, error: float, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 5, 300) * torch.logspace(-2, 2, 5)[:, None]).to(dtype)
    before = x.clone()

    rounded = round_rows(x, kind)

    assert rounded.kind == kind and rounded.codes.shape == x.shape and rounded.restore().dtype == dtype
    difference = (rounded.restore().float() - x.float()).norm(dim=-1) / x.float().norm(dim=-1)
    assert float(difference.max()) < error
    assert torch.equal(x, before)


def test_the_worked_example_of_the_page() -> None:
    rounded = round_rows(torch.tensor([[2.54, 0.31, -0.01, 0.0]]), "int8")

    assert rounded.codes.tolist() == [[127, 16, 0, 0]]
    torch.testing.assert_close(rounded.scale, torch.tensor([[0.02]]))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_token_of_zeros_stays_zeros(kind: Kind) -> None:
    assert not round_rows(torch.zeros(3, 8), kind).restore().any()

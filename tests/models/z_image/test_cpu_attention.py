"""The blocked attention for CPUs against float64, and when it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.z_image import cpu_attention
from models.z_image.attention import attend
from tests.support.tiny_model import relative_error


def heads(tokens: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as the model's head-wise norms make them, values; (B, 2, tokens, 64) bfloat16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, tokens, 2, 64, generator=generator)
    q, k = (F.normalize(x, dim=-1) * 64**0.5 * 1.3 for x in (q, k))
    return tuple(x.bfloat16().transpose(1, 2) for x in (q, k, v))  # type: ignore[return-value]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 512), (2, 600)])
def test_it_is_as_right_as_bfloat16_products_can_be(batch: int, tokens: int) -> None:
    q, k, v = heads(tokens, batch)

    result = cpu_attention.attend(q, k, v)

    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert result.shape == expected.shape
    assert relative_error(result.double(), expected) < 6e-3  # scores rounded without a care: 1.1e-2


def test_rows_are_done_a_cache_s_worth_at_a_time_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(600)
    whole = cpu_attention.attend(q, k, v)

    monkeypatch.setattr(cpu_attention, "_SCORES", 600 * 100)

    torch.testing.assert_close(cpu_attention.attend(q, k, v), whole, rtol=1e-2, atol=1e-3)


def test_it_is_taken_only_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "multiplies_bfloat16", lambda: True)
    q, k, v = heads(512)
    taken: list[Tensor] = []
    monkeypatch.setattr(cpu_attention, "attend", lambda q, k, v: taken.append(q) or q)

    attend(q, k, v)
    assert len(taken) == 1

    attend(q, k, v, exact=True)
    attend(q, k, v, torch.ones(512, 512, dtype=torch.bool))
    attend(q.float(), k.float(), v.float())
    attend(*heads(480))
    with sdpa_kernel(SDPBackend.MATH):
        attend(q, k, v)
    assert len(taken) == 1

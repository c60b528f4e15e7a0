"""What the four operations mean, against formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared import ops
from shared.ops import eager
from shared.ops.eager import SHORT

B, S, H, E = 2, 5, 3, 8
D = H * E
EPS = 1e-5


def written_out(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
class TestMeaning:
    def test_rms_norm_modulate(self, dtype: torch.dtype, tolerance: float, exact: bool) -> None:
        x, weight, scale = (torch.randn(*shape, dtype=dtype) for shape in ((B, S, D), (D,), (B, 1, D)))

        result = ops.rms_norm_modulate(x, weight, scale, EPS, exact=exact)

        assert result.dtype == dtype
        torch.testing.assert_close(
            result.double(), written_out(x, weight) * scale.double(), rtol=tolerance, atol=tolerance
        )

    @pytest.mark.parametrize("gated", [True, False])
    def test_gate_residual(self, dtype: torch.dtype, tolerance: float, exact: bool, gated: bool) -> None:
        x, y, weight = (torch.randn(*shape, dtype=dtype) for shape in ((B, S, D), (B, S, D), (D,)))
        gate = torch.randn(1, 1, D, dtype=dtype) if gated else None
        before = x.clone()

        result = ops.gate_residual(x, y, gate, weight, EPS, exact=exact)

        added = written_out(y, weight) * (1 if gate is None else gate.double())
        assert result.dtype == dtype
        assert torch.equal(x, before)
        torch.testing.assert_close(result.double(), x.double() + added, rtol=tolerance, atol=2 * tolerance)

    def test_qk_norm_rope(self, dtype: torch.dtype, tolerance: float, exact: bool) -> None:
        qkv, q_weight, k_weight = (torch.randn(*shape, dtype=dtype) for shape in ((B, S, 3 * D), (E,), (E,)))
        angles = torch.randn(B, S, 1, E // 2)
        rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
        split = qkv.clone().view(B, S, 3, H, E)  # qkv is used up

        q, k, v = ops.qk_norm_rope(qkv, torch.stack([q_weight, k_weight]), rope, H, EPS, exact=exact)

        assert {x.dtype for x in (q, k, v)} == {dtype if exact else torch.float32}
        assert torch.equal(v.to(dtype), split[:, :, 2].transpose(1, 2))
        for turned, index, weight in ((q, 0, q_weight), (k, 1, k_weight)):
            even, odd = written_out(split[:, :, index], weight).unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = rope.double().unbind(-1)
            expected = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
            torch.testing.assert_close(
                turned.double(), expected.transpose(1, 2), rtol=2 * tolerance, atol=2 * tolerance
            )

    def test_swiglu(self, dtype: torch.dtype, tolerance: float, exact: bool) -> None:
        w13 = torch.randn(B, S, 2 * D, dtype=dtype)

        result = ops.swiglu(w13)

        gate, value = w13.double().chunk(2, dim=-1)
        assert result.dtype == dtype
        torch.testing.assert_close(
            result.double(), gate * gate.sigmoid() * value, rtol=2 * tolerance, atol=2 * tolerance
        )


def test_long_sequences_are_handed_on_in_their_own_type() -> None:
    """Above, attention has a faster way in bfloat16."""
    qkv, weights = torch.randn(1, SHORT, 3 * 8).bfloat16(), torch.ones(2, 8)

    assert {x.dtype for x in ops.qk_norm_rope(qkv, weights, torch.ones(1, SHORT, 1, 4, 2), 1, EPS)} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
def test_many_tokens_are_worked_on_in_parts_to_the_same_bits(
    dtype: torch.dtype, per_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = SHORT + 37
    x, qkv = torch.randn(B, tokens, D), torch.randn(B, tokens, 3 * D, dtype=dtype)
    y, weight, weights = torch.randn(B, tokens, D, dtype=dtype), torch.rand(D), torch.rand(2, E)
    factor = torch.randn(1, tokens if per_token else 1, D)
    rope = torch.randn(1, tokens, 1, E // 2, 2)

    def results() -> list[Tensor]:
        return [
            eager.rms_norm_modulate(x, weight, factor, EPS, dtype=dtype),
            eager.rms_norm_modulate(y, weight, None, EPS),
            eager.gate_residual(x, y, factor, weight, EPS),
            eager.gate_residual(y, y, None, weight, EPS),
            *eager.qk_norm_rope(qkv.clone(), weights, rope, H, EPS),
        ]

    monkeypatch.setattr(eager, "_AT_ONCE", tokens)
    whole = results()
    monkeypatch.setattr(eager, "_AT_ONCE", 64)

    assert all(map(torch.equal, results(), whole))


def test_rotations_may_be_complex_numbers() -> None:
    angles, weights, qkv = torch.randn(1, S, 1, E // 2), torch.rand(2, E), torch.randn(B, S, 3 * D)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)

    expected = ops.qk_norm_rope(qkv.clone(), weights, rope, H, EPS)
    got = ops.qk_norm_rope(qkv.clone(), weights, torch.view_as_complex(rope), H, EPS)

    assert all(map(torch.equal, got, expected))


def test_a_float32_stream_is_normed_in_the_type_of_the_linear_that_reads_it() -> None:
    stream, weight, linear = torch.randn(1, S, D), torch.rand(D), torch.nn.Linear(D, 4, dtype=torch.bfloat16)
    added = torch.randn(1, S, D).bfloat16()

    longer, normed = ops.gate_residual_norm_into(linear, stream, added, None, weight, weight, None, EPS)

    expected = stream.double() + written_out(added, weight)
    assert (longer.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(longer.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normed.double(), written_out(expected, weight), rtol=1e-2, atol=1e-2)


def test_gradients_flow_through_every_operation() -> None:
    x, y, qkv = (torch.randn(1, S, n, requires_grad=True) for n in (D, D, 3 * D))
    weight, scale, heads = (torch.randn(*shape, requires_grad=True) for shape in ((D,), (1, 1, D), (2, E)))
    rope = torch.ones(1, S, 1, E // 2, 2)

    parts = [
        ops.rms_norm_modulate(x, weight, scale, EPS),
        ops.gate_residual(x, y, scale, weight, EPS),
        *ops.qk_norm_rope(qkv, heads, rope, H, EPS),
        ops.swiglu(x),
    ]
    sum(part.square().sum() for part in parts).backward()

    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (x, y, qkv, weight, scale, heads))

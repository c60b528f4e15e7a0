"""TwinFlow's sampler against its published form, written out anew in float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from shared.samplers import unified


def reference(predict, x: Tensor, noises: Iterator[Tensor], steps: int, stochast_ratio: float) -> Tensor:
    """The loop of the paper's sampler for linear transport, with its own names alpha, gamma and dent."""
    gap, style = {1: (0.6, "few"), 2: (0.6, "few"), 3: (0.5, "any"), 4: (0.5, "any")}.get(steps, (0.0, "mul"))
    u = torch.linspace(0.001, 1 - gap, steps + (gap == 0), dtype=torch.float64)
    u = u[:-1] if gap == 0 else u
    levels = torch.cat([1 - u, torch.zeros(1, dtype=torch.float64)])
    for t, t_next in pairwise(levels):
        target = {"few": torch.zeros_like(t), "any": t_next, "mul": t}[style]
        alpha, gamma, alpha_to, gamma_to = t, 1 - t, 1, -1
        f = predict(x, float(t), float(target))
        dent = alpha * gamma_to - gamma * alpha_to
        z_hat = (x * gamma_to - gamma * f) / dent
        x_hat = (alpha * f - alpha_to * x) / dent
        noise = next(noises) if t_next > 0 else torch.zeros_like(x)
        x = (1 - t_next) * x_hat + t_next * (z_hat * (1 - stochast_ratio) ** 0.5 + noise * stochast_ratio**0.5)
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("fresh", [1.0, 0.8, 0.0])
def test_agrees_with_the_published_equations(steps: int, fresh: float) -> None:
    def predict(x: Tensor, sigma: float, target: float) -> Tensor:
        return torch.sin(3 * x) + sigma * x - target

    noises = torch.randn(6, 5, dtype=torch.float64)
    start = torch.randn(5, dtype=torch.float64)
    mine, theirs = iter(noises), iter(noises)

    *_, ours = unified.sample(predict, start, unified.schedule(steps), lambda: next(mine), fresh=fresh)

    torch.testing.assert_close(ours, reference(predict, start, theirs, steps, fresh), rtol=1e-10, atol=1e-10)


def test_two_and_four_steps_stop_at_the_published_levels() -> None:
    assert unified.schedule(2) == pytest.approx([0.999, 0.6, 0])
    assert unified.schedule(4) == pytest.approx([0.999, 0.8327, 0.6663, 0.5, 0], abs=1e-4)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps >= 1"):
        unified.schedule(0)

"""Euler's method on a rectified flow with a static shift: what Z-Image was trained and distilled for.

The forward process is x(sigma) = (1 - sigma) x0 + sigma noise, so its velocity is noise - x0 and one step is
x += (sigma_next - sigma) * velocity. N steps call the network N times, at sigmas linspace(1, 1/N, N) moved towards
noise by the shift; no call is spent at sigma 0, where nothing is left to do.

That is what diffusers >= 0.42 and the official repository do for N steps. Older pipelines (Wan2GP's among them)
spend their last call at sigma 0: their "9 steps" equal 8 here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from shared.samplers import Predict


def schedule(steps: int, shift: float) -> list[float]:
    """steps + 1 sigmas from 1 to 0: s*x / (1 + (s - 1)*x) for x = 1, (N-1)/N, ..., 1/N, then 0.

    steps: >= 1. shift: > 0; 1 leaves the spacing even (Turbo 3.0, Base 6.0). Raises ValueError otherwise.
    Source: Esser et al. 2024, arXiv 2403.03206 (timestep shift); Tongyi-MAI/Z-Image src/zimage/scheduler.py.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"need steps >= 1 and shift > 0, got steps {steps}, shift {shift}")
    even = [(steps - i) / steps for i in range(steps)]
    return [shift * x / (1 + (shift - 1) * x) for x in even] + [0.0]


def sample(predict: Predict, latents: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Yield latents (B, C, h, w) float32 after each of len(sigmas) - 1 steps."""
    for sigma, after in pairwise(sigmas):
        latents = latents + (after - sigma) * predict(latents, sigma)
        yield latents

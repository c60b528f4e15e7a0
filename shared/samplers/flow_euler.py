"""Euler's method on a rectified flow with a static shift: what Z-Image was trained and distilled for.

One step is x += (sigma_next - sigma) * velocity. N steps call the network N times, at sigmas linspace(1, 1/N, N) moved
towards noise by the shift; no call is spent at sigma 0, where nothing is left to do.

That is what diffusers >= 0.42 and the official repository do for N steps. Older pipelines (Wan2GP's among them)
spend their last call at sigma 0: their "9 steps" equal 8 here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from shared.samplers.schedules import simple as schedule

if TYPE_CHECKING:
    from torch import Tensor

    from shared.samplers import Draw, Predict

__all__ = ["sample", "schedule"]


def sample(predict: Predict, latents: Tensor, sigmas: Sequence[float], draw: Draw | None = None) -> Iterator[Tensor]:
    """Yield latents (B, C, h, w) float32 after each of len(sigmas) - 1 steps. Draws no noise."""
    for sigma, after in pairwise(sigmas):
        latents = latents + (after - sigma) * predict(latents, sigma)
        yield latents

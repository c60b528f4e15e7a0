"""Heun's method: an Euler step, the velocity where it ends, and the step again with the mean of both.

Second order for two forwards a step. The last step, to sigma 0, stays Euler's: N steps call the network 2N - 1 times.
Source: Karras et al. 2022, arXiv 2206.00364, algorithm 1, on the flow's own time.
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
    """Yield latents (B, C, h, w) after each step. Draws no noise."""
    for sigma, after in pairwise(sigmas):
        velocity = predict(latents, sigma)
        ahead = latents + (after - sigma) * velocity
        if after > 0:
            ahead = latents + (after - sigma) * (velocity + predict(ahead, after)) / 2
        latents = ahead
        yield latents

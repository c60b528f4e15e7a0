"""Refined exponential solver, multistep: second order for one forward a step, exact if x0 is linear in log sigma.

With u = -log sigma the flow is dx/du = x0 - x. A step of h multiplies x by e^-h and adds h (b1 x0 + b2 x0_before),
where b2 = phi2(-h) / c, b1 = phi1(-h) - b2, and c = (u_before - u) / h. The first step and the one to sigma 0, where u
is infinite, hold x0 constant, which is Euler's step. Unlike DPM++ 2M it has a finite u at sigma 1, so the second step
already uses the first. Source: Zhang and others 2023, arXiv 2308.02157, equation of the two-step method.
"""

from __future__ import annotations

import math
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
    before: tuple[float, Tensor] | None = None  # sigma and x0 of the step before
    for sigma, after in pairwise(sigmas):
        x0 = latents - sigma * predict(latents, sigma)
        shrink = after / sigma
        moved = shrink * latents + (1 - shrink) * x0
        if before is not None and after > 0:
            h = math.log(sigma / after)
            phi1 = -math.expm1(-h) / h
            phi2 = (1 - phi1) / h
            c = math.log(sigma / before[0]) / h
            moved = moved + h * phi2 / c * (before[1] - x0)
        before = sigma, x0
        latents = moved
        yield latents

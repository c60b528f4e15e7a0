"""Extended reverse-time SDE solver, three stages: one forward a step, fresh noise in every step but the last.

The reverse process may carry more or less noise. Its amount is set by phi(r) in the noise-to-signal ratio
r = sigma / (1 - sigma); phi(r) = r is the plain ODE, the authors' best is phi(r) = r (exp(r^0.3) + 10), used here.
With g(r) = phi(r) / r, a step from sigma to sigma' (r to r') is

    x' = (sigma'/sigma) (g'/g) x + (1 - sigma') (1 - phi'/phi) x0 + sigma' sqrt(1 - (g'/g)^2) noise

plus, in the second and third stage, (1 - sigma') times integrals over 1/phi times the differences of x0 seen so far.
At sigma 1 r is infinite: the first step takes x0 and fresh noise alone, and the stages begin with the third step.
The third stage makes the error smaller; the order, held by the first steps, is two with it and without it.
Source: Cui and others 2023, arXiv 2309.06169 (ER-SDE-Solver-3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from shared.samplers.schedules import simple as schedule

if TYPE_CHECKING:
    from torch import Tensor

    from shared.samplers import Draw, Predict

__all__ = ["sample", "schedule"]

_NODES = 200  # of the quadrature; the integrand is smooth in log r, so its error is far below a step's own


def authors_choice(r: float) -> float:
    """phi(r) / r of the paper's "ER-SDE-Solver"."""
    return math.exp(r**0.3) + 10


def sample(
    predict: Predict,
    latents: Tensor,
    sigmas: Sequence[float],
    draw: Draw,
    *,
    relative_noise: Callable[[float], float] = authors_choice,
    stages: int = 3,
) -> Iterator[Tensor]:
    """Yield latents (B, C, h, w) after each step. relative_noise: g(r), not falling. stages: 1, 2 or 3."""
    ratios: list[float] = []  # r of this and the two steps before
    x0_before = slope_before = None
    for sigma, after in pairwise(sigmas):
        x0 = latents - sigma * predict(latents, sigma)
        if after == 0:
            yield x0
            return
        r, r_after = _ratio(sigma), _ratio(after)
        ratios = [*ratios[-2:], r]
        g, g_after = relative_noise(r), relative_noise(r_after)
        kept = g_after / g
        moved = after / sigma * kept * latents + (1 - after) * (1 - kept * r_after / r) * x0
        if stages > 1 and x0_before is not None:
            first, second = _integrals(r_after, r, relative_noise) if math.isfinite(r) else (0.0, 0.0)
            step, phi_after = r_after - r, r_after * g_after
            slope = (x0 - x0_before) / (r - ratios[-2])
            moved = moved + (1 - after) * (step + phi_after * first) * slope
            if stages > 2 and slope_before is not None:
                curve = (slope - slope_before) / ((r - ratios[-3]) / 2)
                moved = moved + (1 - after) * (step**2 / 2 + phi_after * second) * curve
            slope_before = slope
        x0_before = x0
        fresh = math.sqrt(max(1 - kept**2, 0.0))
        latents = moved + after * fresh * draw() if fresh else moved
        yield latents


def _ratio(sigma: float) -> float:
    return sigma / (1 - sigma) if sigma < 1 else math.inf


def _integrals(low: float, high: float, relative_noise: Callable[[float], float]) -> tuple[float, float]:
    """The integrals of 1/phi and (r - high)/phi from low to high, by the midpoint rule in log r."""
    width = math.log(high / low) / _NODES
    first = second = 0.0
    for i in range(_NODES):
        r = low * math.exp((i + 0.5) * width)
        weight = width / relative_noise(r)  # dr / phi(r) = d(log r) / g(r)
        first += weight
        second += weight * (r - high)
    return first, second

"""DPM-Solver++ (2M) on a rectified flow: second order for one forward a step, by remembering the step before.

In the log signal-to-noise ratio L = log((1 - sigma) / sigma) the exact step with x0 held constant is
x' = (sigma'/sigma) x + ((1 - sigma') - (1 - sigma) sigma'/sigma) x0, which is Euler's. The second order replaces x0 by
x0 + h / (2 h_before) * (x0 - x0_before), h being steps in L. At sigma 1 and 0 L is infinite: the steps there, and the
one after the first, are Euler's. Source: Lu et al. 2022, arXiv 2211.01095, algorithm 2.
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
    x0_before: Tensor | None = None
    h_before = math.inf
    for sigma, after in pairwise(sigmas):
        x0 = latents - sigma * predict(latents, sigma)
        h = _log_snr(after) - _log_snr(sigma)
        target = x0
        if x0_before is not None and math.isfinite(h) and math.isfinite(h_before):
            target = x0 + h / (2 * h_before) * (x0 - x0_before)
        shrink = after / sigma
        latents = shrink * latents + (1 - shrink) * target
        x0_before, h_before = x0, h
        yield latents


def _log_snr(sigma: float) -> float:
    if sigma in (0.0, 1.0):
        return -math.inf if sigma else math.inf
    return math.log((1 - sigma) / sigma)

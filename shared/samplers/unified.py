"""TwinFlow's unified sampler: one to four steps with weights that were taught where each step is to land.

The network gets, beside the noise level sigma, a target level. A step jumps to x0 = x - sigma v and goes back to the
next level with fresh noise. One or two steps aim at 0, three or four at the level of the next step, more at their own.
The levels are even between the two gaps of the published settings: 2 steps stop at 0.999, 0.6, and 4 steps at 0.999,
0.833, 0.666, 0.5; then 0. The schedule's shift has no part in it.

Sources: inclusionAI/TwinFlow inference.py and README (sampler, gaps); Wan2GP models/z_image/pipeline_z_image.py (the
target for more than two steps).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from shared.samplers import Draw, Predict

_FIRST_GAP = 0.001  # the walk begins just below pure noise
_FEW, _SOME = 2, 4  # most steps that aim at 0, and at the next level


def schedule(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 sigmas from 0.999 to 0. Raises ValueError for steps < 1."""
    if steps < 1:
        raise ValueError(f"need steps >= 1, got {steps}")
    last_gap = 0.6 if steps <= _FEW else 0.5 if steps <= _SOME else 0.0
    spaces = steps - 1 if last_gap else steps  # without a last gap, the level 0 itself is the last of the even ones
    width = (1 - _FIRST_GAP - last_gap) / max(spaces, 1)
    return [1 - _FIRST_GAP - i * width for i in range(steps)] + [0.0]


def sample(
    predict: Predict, latents: Tensor, sigmas: Sequence[float], draw: Draw, *, fresh: float = 1.0
) -> Iterator[Tensor]:
    """Yield latents (B, C, h, w) after each step. Calls predict(latents, sigma, target).

    fresh: share of the variance that is drawn anew in each step but the last, 0 to 1; the rest is the noise found.
    """
    steps = len(sigmas) - 1
    for sigma, after in pairwise(sigmas):
        target = 0.0 if steps <= _FEW else after if steps <= _SOME else sigma
        velocity = predict(latents, sigma, target)
        x0, found = latents - sigma * velocity, latents + (1 - sigma) * velocity
        if after == 0:
            yield x0
            return
        mixed = math.sqrt(fresh) * draw() + (math.sqrt(1 - fresh) * found if fresh < 1 else 0)
        latents = (1 - after) * x0 + after * mixed
        yield latents

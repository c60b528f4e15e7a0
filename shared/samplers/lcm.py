"""Latent consistency sampling: jump to x0, go back to the next noise level with fresh noise.

For weights (or LoRAs) distilled so that one jump lands on a picture; on others it smooths. The last step is the jump.
Source: Song et al. 2023, arXiv 2303.01469, algorithm 1 (multistep consistency sampling).
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


def sample(predict: Predict, latents: Tensor, sigmas: Sequence[float], draw: Draw) -> Iterator[Tensor]:
    """Yield latents (B, C, h, w) after each step; draws noise in every step but the last."""
    for sigma, after in pairwise(sigmas):
        latents = latents - sigma * predict(latents, sigma)
        if after > 0:
            latents = (1 - after) * latents + after * draw()
        yield latents

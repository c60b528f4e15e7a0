"""More different pictures from different seeds: the prompt's features are disturbed while the composition forms.

Distilled models settle on one composition per prompt, whatever the noise. In the first steps each picture gets the
prompt with noise on it, drawn from its own seed; the later steps get the prompt as it is, and bring the details back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The median magnitude of a Gaussian is this times its standard deviation.
_MEDIAN_OF_NORMAL = 0.6745
# A step of Knuth's linear congruential generator: the disturbance must not repeat the noise the latents start from.
_FACTOR, _OFFSET, _SEEDS = 6364136223846793005, 1442695040888963407, 2**63


@dataclass(frozen=True, slots=True)
class Diversity:
    """strength: noise on a token's features in units of their own size; 0 is off. end: share of the steps with it."""

    strength: float = 0.0
    end: float = 0.25

    @property
    def active(self) -> bool:
        return self.strength > 0 and self.end > 0

    def disturb(self, features: Tensor, seed: int) -> Tensor:
        """Features (tokens, width) with the seed's noise on them, in their type.

        A token's size is the median of its magnitudes: a few of an encoder's channels are hundreds of times larger than
        the rest, and the noise is not to follow those.
        """
        generator = torch.Generator("cpu").manual_seed((seed * _FACTOR + _OFFSET) % _SEEDS)
        noise = torch.randn(features.shape, generator=generator, device="cpu", dtype=torch.float32).to(features.device)
        size = features.float().abs().median(dim=-1, keepdim=True).values / _MEDIAN_OF_NORMAL
        return (features.float() + self.strength * size * noise).to(features.dtype)

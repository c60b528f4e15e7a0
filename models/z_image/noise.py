"""The noise of a generation: every picture draws its own from its own seed, so that alone it is as in a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Variation:
    """Pictures near the one of the main seed: the start is turned towards the noise of another seed.

    strength: 0 is the main seed's picture, 1 that of seeds[i]. seeds: one per picture.
    """

    strength: float
    seeds: tuple[int, ...]


class NoiseSource:
    """Draws (B, channels, h, w) float32 on the CPU: the start first, then what stochastic samplers ask for.

    On the CPU, so that a seed gives the same numbers on every device.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], variation: Variation | None = None) -> None:
        self._shape = shape
        self._generators = _generators(seeds)
        self._variation = variation

    def start(self) -> Tensor:
        """The first noise of each picture. Call it once, before draw()."""
        noise = self.draw()
        if self._variation is None or self._variation.strength == 0:
            return noise
        others = _normal(_generators(self._variation.seeds), self._shape)
        return torch.stack([slerp(a, b, self._variation.strength) for a, b in zip(noise, others, strict=True)])

    def draw(self) -> Tensor:
        """Fresh noise for each picture, next in its own sequence."""
        return _normal(self._generators, self._shape)


def noise(seeds: Sequence[int], height: int, width: int, channels: int) -> Tensor:
    """Starting latents (B, channels, height / 8, width / 8) float32, each from its own seed; sizes in pixels."""
    return NoiseSource(seeds, (channels, height // 8, width // 8)).start()


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From `a` (share 0) to `b` (share 1) along the arc between them; a straight line if they are (nearly) parallel.

    A straight mean of two independent noises would have half the variance, which the network takes for less noise.
    Source: Shoemake 1985, "Animating rotation with quaternion curves".
    """
    cosine = torch.dot(a.flatten().double(), b.flatten().double()) / (a.double().norm() * b.double().norm())
    angle = math.acos(min(max(float(cosine), -1.0), 1.0))
    sine = math.sin(angle)
    if abs(sine) < 1e-6:
        return (1 - share) * a + share * b
    return math.sin((1 - share) * angle) / sine * a + math.sin(share * angle) / sine * b


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def _normal(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=g, device="cpu", dtype=torch.float32) for g in generators])

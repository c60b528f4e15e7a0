"""A rectified flow whose answers are known: data is Gaussian, one number wide, float64.

Latents at sigma have mean (1 - sigma) MEAN and variance V = (1 - sigma)^2 SPREAD^2 + sigma^2; what a perfect network
answers, and where the ordinary differential equation leads, follow in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MEAN, SPREAD = 0.3, 0.5


def deviation(sigma: float) -> float:
    return math.hypot((1 - sigma) * SPREAD, sigma)


def velocity(x: Tensor, sigma: float, _target: float = 0.0, *, mean: float = MEAN) -> Tensor:
    """E[noise - x0 | x], the answer of a perfect network."""
    centred = (x - (1 - sigma) * mean) / deviation(sigma) ** 2
    return sigma * centred - (mean + (1 - sigma) * SPREAD**2 * centred)


def jump(x: Tensor, sigma: float, _target: float = 0.0, *, mean: float = MEAN) -> Tensor:
    """The answer of a perfect consistency model: x - sigma * answer is the end of x's path."""
    end = mean + SPREAD * (x - (1 - sigma) * mean) / deviation(sigma)
    return (x - end) / sigma


def path(x: float, begin: float, end: float) -> float:
    """Where the exact path through x at `begin` is at `end`."""
    return (1 - end) * MEAN + deviation(end) / deviation(begin) * (x - (1 - begin) * MEAN)


def even(begin: float, end: float, steps: int) -> list[float]:
    return [begin + (end - begin) * i / steps for i in range(steps + 1)]


def no_noise() -> Tensor:
    return torch.zeros(1, dtype=torch.float64)


def error_of_path(sampler: ModuleType, sigmas: Sequence[float]) -> float:
    """How far the sampler ends from the exact path; a stochastic one gets no noise."""
    start = torch.tensor([0.7], dtype=torch.float64)
    *_, last = sampler.sample(velocity, start, sigmas, no_noise)
    return abs(float(last) - path(0.7, sigmas[0], sigmas[-1]))


def final_variance(
    sampler: ModuleType, sigmas: Sequence[float], answer: Callable[..., Tensor] = velocity, **options: Any
) -> float:
    """The exact variance of the sampler's results, without drawing any.

    With mean 0 everything is linear, so the start and each draw are given a coordinate of their own; the result's
    coordinates are their weights.
    """
    sources = iter(range(1, len(sigmas) + 1))

    def unit(index: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(index), len(sigmas) + 1).double()

    start = unit(0) * deviation(sigmas[0])
    *_, last = sampler.sample(
        lambda x, sigma, target=0.0: answer(x, sigma, target, mean=0.0),
        start, sigmas, lambda: unit(next(sources)), **options,
    )  # fmt: skip
    return float(last.square().sum())

"""Schedules: at which noise levels a sampler stops on its way from sigma 1 to sigma 0. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

# ComfyUI's choice for its schedule of this name (comfy/samplers.py, beta_scheduler); Lee et al. 2024, arXiv 2407.12173.
_BETA_SHAPE = 0.6


def simple(steps: int, shift: float) -> list[float]:
    """steps + 1 sigmas from 1 to 0: s*x / (1 + (s - 1)*x) for x = 1, (N-1)/N, ..., 1/N, then 0.

    steps: >= 1. shift: > 0; 1 leaves the spacing even (Turbo 3.0, Base 6.0). Raises ValueError otherwise.
    Source: Esser et al. 2024, arXiv 2403.03206 (timestep shift); Tongyi-MAI/Z-Image src/zimage/scheduler.py.
    """
    _require(steps, shift)
    return [_shifted(1 - i / steps, shift) for i in range(steps)] + [0.0]


def beta(steps: int, shift: float) -> list[float]:
    """The same with x at quantiles of the Beta(0.6, 0.6) distribution: more steps at both ends, fewer in the middle."""
    _require(steps, shift)
    return [_shifted(_beta_quantile(1 - i / steps), shift) for i in range(steps)] + [0.0]


def linear(steps: int, shift: float) -> list[float]:
    """Even steps in sigma itself, whatever the shift."""
    _require(steps, shift)
    return [1 - i / steps for i in range(steps)] + [0.0]


SCHEDULES: Mapping[str, Callable[[int, float], list[float]]] = {"simple": simple, "beta": beta, "linear": linear}


def custom(sigmas: Sequence[float]) -> list[float]:
    """Sigmas as somebody typed them, closed by 0. Raises ValueError unless they fall and lie in (0, 1]."""
    closed = [float(sigma) for sigma in sigmas]
    if closed and closed[-1] != 0:
        closed.append(0.0)
    if len(closed) < 2 or closed[0] > 1 or not all(a > b for a, b in pairwise(closed)):
        raise ValueError("sigmas must be one or more numbers that fall, from 1 at most; a 0 at the end may be left out")
    return closed


def _require(steps: int, shift: float) -> None:
    if steps < 1 or shift <= 0:
        raise ValueError(f"need steps >= 1 and shift > 0, got steps {steps}, shift {shift}")


def _shifted(x: float, shift: float) -> float:
    return shift * x / (1 + (shift - 1) * x)


def _beta_quantile(share: float) -> float:
    """Where the distribution function of Beta(a, a) reaches `share`, by bisection in the lower, symmetric half."""
    if share > 0.5:
        return 1 - _beta_quantile(1 - share)
    low, high = 0.0, 0.5
    for _ in range(60):  # a float's precision
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_distribution(middle) < share else (low, middle)
    return (low + high) / 2


def _beta_distribution(x: float) -> float:
    """P(X < x) for x <= 1/2, by the power series of the incomplete beta function (DLMF 8.17.7 and 15.2.1)."""
    a = _BETA_SHAPE
    total, factor = 0.0, 1.0
    for n in range(60):  # terms fall faster than 2^-n
        total += factor / (a + n)
        factor *= (n + 1 - a) / (n + 1) * x
    return math.pow(x, a) * total * math.gamma(2 * a) / math.gamma(a) ** 2

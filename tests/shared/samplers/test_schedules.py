"""Schedules against diffusers, against counting, and their edges."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from shared.samplers import schedules


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 8, 30])
def test_simple_agrees_with_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])

    ours = torch.tensor(schedules.simple(steps, shift))

    torch.testing.assert_close(ours, scheduler.sigmas, rtol=0, atol=1e-6)


def test_turbo_spends_its_eight_forwards_as_published() -> None:
    expected = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]

    assert schedules.simple(8, 3.0) == pytest.approx(expected, abs=1e-4)


def test_beta_stops_at_the_quantiles_of_its_distribution() -> None:
    def mass_below(x: float) -> float:
        # x = sin(angle)^2 makes the density (sin cos)^0.2, free of poles; Simpson's rule over the angle.
        def simpson(end: float, pieces: int = 2000) -> float:
            width = end / pieces
            values = [(math.sin(i * width) * math.cos(i * width)) ** 0.2 for i in range(pieces + 1)]
            return width / 3 * (values[0] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]) + values[-1])

        return simpson(math.asin(math.sqrt(x))) / simpson(math.pi / 2 - 1e-12)

    sigmas = schedules.beta(8, 1.0)

    assert [mass_below(sigma) for sigma in sigmas[1:-1]] == pytest.approx([i / 8 for i in range(7, 0, -1)], abs=2e-4)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_every_schedule_falls_from_one_to_zero(name: str, steps: int) -> None:
    sigmas = schedules.SCHEDULES[name](steps, 3.0)

    assert len(sigmas) == steps + 1
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert sigmas == sorted(set(sigmas), reverse=True)


def test_linear_knows_no_shift() -> None:
    assert schedules.linear(4, 3.0) == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize(("steps", "shift"), [(0, 3.0), (-1, 3.0), (8, 0.0)])
def test_impossible_schedules_are_refused(name: str, steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="need steps >= 1 and shift > 0"):
        schedules.SCHEDULES[name](steps, shift)


def test_typed_sigmas_need_no_zero_at_the_end() -> None:
    assert schedules.custom([1, 0.5]) == schedules.custom([1, 0.5, 0]) == [1, 0.5, 0]


@pytest.mark.parametrize("sigmas", [[], [0], [1.5, 0.5], [0.5, 0.7], [1, 1], [1, -0.5], [1, 0, 0]])
def test_typed_sigmas_that_do_not_fall_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="must be one or more numbers that fall"):
        schedules.custom(sigmas)

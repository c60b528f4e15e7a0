"""The schedule against diffusers' scheduler, and Euler's method against a flow with a known solution."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import shared.samplers as samplers
from shared.samplers import flow_euler


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 8, 30])
def test_schedule_agrees_with_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])

    ours = torch.tensor(flow_euler.schedule(steps, shift))

    torch.testing.assert_close(ours, scheduler.sigmas, rtol=0, atol=1e-6)


def test_turbo_spends_its_eight_forwards_as_published() -> None:
    expected = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]

    assert flow_euler.schedule(8, 3.0) == pytest.approx(expected, abs=1e-4)


def test_one_step_is_one_call() -> None:
    calls: list[float] = []

    def predict(x: torch.Tensor, sigma: float) -> torch.Tensor:
        calls.append(sigma)
        return x

    results = list(flow_euler.sample(predict, torch.ones(1), flow_euler.schedule(5, 3.0)))

    assert len(results) == len(calls) == 5
    assert min(calls) > 0


def test_error_falls_with_the_first_power_of_the_step() -> None:
    def error(steps: int) -> float:
        # dx/dsigma = x from sigma 1 to 0 takes 1 to 1/e.
        last = list(
            flow_euler.sample(lambda x, _: x, torch.ones(1, dtype=torch.float64), flow_euler.schedule(steps, 1))
        )[-1]
        return abs(float(last) - 1 / math.e)

    assert error(64) / error(128) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("steps", "shift"), [(0, 3.0), (-1, 3.0), (8, 0.0)])
def test_impossible_schedules_are_refused(steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="need steps >= 1 and shift > 0"):
        flow_euler.schedule(steps, shift)


def test_no_name_means_the_default() -> None:
    assert samplers.get("") is samplers.get("default")
    assert set(samplers.names()) >= {"default", "euler"}

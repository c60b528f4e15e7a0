"""Every sampler against a flow with known answers: order of convergence, forwards, ends of the walk."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import shared.samplers as samplers
from shared.samplers import dpmpp_2m, er_sde, flow_euler, heun, lcm, res_multistep, unified
from tests.support.gaussian_flow import deviation, error_of_path, even, final_variance, jump, no_noise, velocity

ALL = [flow_euler, heun, dpmpp_2m, res_multistep, er_sde, lcm, unified]


def order(coarse: float, fine: float, refinement: int) -> float:
    return math.log(coarse / fine, refinement)


@pytest.mark.parametrize(("sampler", "promised"), [(flow_euler, 1), (heun, 2), (dpmpp_2m, 2), (res_multistep, 2)])
def test_error_falls_with_the_promised_power_of_the_step(sampler: ModuleType, promised: int) -> None:
    coarse, fine = (error_of_path(sampler, even(0.9, 0.1, steps)) for steps in (64, 256))

    assert order(coarse, fine, 4) == pytest.approx(promised, abs=0.15)


@pytest.mark.parametrize(("stages", "promised"), [(1, 1), (2, 2), (3, 2)])
def test_er_sde_as_an_ode_has_its_order(stages: int, promised: int) -> None:
    def error(steps: int) -> float:
        variance = final_variance(er_sde, even(0.9, 0.1, steps), relative_noise=lambda _: 1.0, stages=stages)
        return abs(variance - deviation(0.1) ** 2)

    assert order(error(64), error(256), 4) == pytest.approx(promised, abs=0.3)


def test_er_sde_with_noise_converges_to_the_data_s_variance() -> None:
    def error(steps: int) -> float:
        return abs(final_variance(er_sde, even(0.9, 0.1, steps)) - deviation(0.1) ** 2)

    assert order(error(32), error(128), 4) > 1.8
    assert error(128) < 1e-4


@pytest.mark.parametrize("sampler", [lcm, unified])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_consistency_model_gives_the_data_s_variance_in_any_number_of_steps(sampler: ModuleType, steps: int) -> None:
    assert final_variance(sampler, sampler.schedule(steps, 1.0), jump) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize("sampler", ALL, ids=lambda module: module.__name__)
def test_the_whole_schedule_ends_on_the_last_guess_of_the_data(sampler: ModuleType) -> None:
    guesses: list[torch.Tensor] = []

    def predict(x: torch.Tensor, sigma: float, target: float = 0.0) -> torch.Tensor:
        answer = velocity(x, sigma)
        guesses.append(x - sigma * answer)
        return answer

    *_, last = sampler.sample(predict, torch.tensor([0.7], dtype=torch.float64), sampler.schedule(6, 3.0), no_noise)

    torch.testing.assert_close(last, guesses[-1])


@pytest.mark.parametrize("name", samplers.names())
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_forwards_are_what_the_register_says(name: str, steps: int) -> None:
    calls: list[float] = []

    def predict(x: torch.Tensor, sigma: float, target: float = 0.0) -> torch.Tensor:
        calls.append(sigma)
        return x

    steps = samplers.steps_of(name, steps)
    sampler = samplers.get(name)
    results = list(sampler.sample(predict, torch.ones(1), sampler.schedule(steps, 3.0), lambda: torch.ones(1)))

    assert len(results) == steps
    assert len(calls) == samplers.forwards(name, steps)
    assert min(calls) > 0


@pytest.mark.parametrize("sampler", [flow_euler, heun, dpmpp_2m, res_multistep])
def test_deterministic_samplers_draw_no_noise(sampler: ModuleType) -> None:
    def draw() -> torch.Tensor:
        raise AssertionError("noise was drawn")

    assert len(list(sampler.sample(velocity, torch.ones(1), sampler.schedule(4, 3.0), draw))) == 4


def test_dpmpp_2m_agrees_with_diffusers() -> None:
    sigmas = [0.99, 0.9, 0.7, 0.4, 0.2, 0.05, 0.0]
    theirs = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True,
        final_sigmas_type="zero", lower_order_final=True,
    )  # fmt: skip
    theirs.set_timesteps(len(sigmas) - 1)
    theirs.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    theirs.timesteps = theirs.sigmas[:-1] * 1000
    x = start = torch.linspace(-2, 2, 7, dtype=torch.float64)
    for t, sigma in zip(theirs.timesteps, sigmas, strict=False):
        x = theirs.step(velocity(x, sigma), t, x).prev_sample

    *_, ours = dpmpp_2m.sample(velocity, start, sigmas)

    torch.testing.assert_close(ours, x, rtol=0, atol=1e-6)


def test_res_multistep_is_exact_when_the_data_guess_is_linear_in_log_sigma() -> None:
    def predict(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return (x - (2 - 0.5 * math.log(sigma))) / sigma

    def exact(x: float, begin: float, end: float) -> float:
        # dx/du = a + b u - x with u = -log sigma, a = 2, b = 0.5.
        rest = x - (2 + 0.5 * -math.log(begin) - 0.5)
        return rest * end / begin + (2 + 0.5 * -math.log(end) - 0.5)

    sigmas = [1.0, 0.7, 0.3, 0.1]
    first, *_, last = res_multistep.sample(predict, torch.tensor([1.5], dtype=torch.float64), sigmas)

    assert float(last) == pytest.approx(exact(float(first), 0.7, 0.1), rel=1e-12)


def test_no_name_means_the_default() -> None:
    assert samplers.get("") is samplers.get("default")


def test_choices_offer_the_models_own_first_and_each_sampler_once() -> None:
    others = ["heun", "dpmpp_2m", "res_multistep", "er_sde", "lcm"]

    assert [name for _, name in samplers.choices()] == ["default", *others]
    assert [name for _, name in samplers.choices(unified=True)] == [
        "unified", "unified_2s", "unified_4s", "euler", *others
    ]  # fmt: skip

"""Host keywords become a request, or an error that says what to do."""

from __future__ import annotations

import pytest

from models.z_image.noise import Variation
from models.z_image.request import GenerateRequest, from_host_kwargs
from shared.quant.errors import UserError
from shared.samplers import schedules


def test_host_names_are_understood_and_foreign_ones_ignored() -> None:
    request = from_host_kwargs(
        {"flow_shift": True},
        {
            "input_prompt": "a fox", "n_prompt": "blur", "seed": 5, "batch_size": 3, "width": 512, "height": 256,
            "sampling_steps": 30, "guide_scale": 4, "shift": 6.0, "VAE_tile_size": (True, 32), "frame_num": 81,
            "sample_solver": "default", "NAG_scale": 1.0, "input_frames": None, "audio_guide": None,
        },
    )  # fmt: skip

    assert (request.prompt, request.negative_prompt, request.seeds) == ("a fox", "blur", (5, 6, 7))
    assert (request.width, request.height, request.steps, request.tile) == (512, 256, 30, 32)
    assert (request.guidance.scale, request.shift) == (4.0, 6.0)


def test_a_shift_meant_for_other_models_does_not_reach_turbo() -> None:
    assert from_host_kwargs({"flow_shift": False}, {"shift": 5.0}).shift == 3.0


def test_a_negative_seed_draws_one() -> None:
    seeds = {from_host_kwargs({}, {"seed": -1}).seeds for _ in range(3)}

    assert len(seeds) == 3
    assert all(s[0] >= 0 for s in seeds)


@pytest.mark.parametrize("size", [8, 250, 1001])
def test_a_size_that_does_not_divide_names_the_nearest_two(size: int) -> None:
    below = max(size // 16, 1) * 16

    with pytest.raises(UserError, match=rf"width {size} is not a multiple of 16.*{below} and {below + 16}"):
        GenerateRequest(prompt="x", width=size)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"sampling_steps": 0}, "0 steps"),
        ({"input_frames": object()}, "control picture"),
    ],
)
def test_what_cannot_be_drawn_is_said(kwargs: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        from_host_kwargs({}, kwargs)


@pytest.mark.parametrize(("asked", "taken"), [("", "unified"), ("default", "unified"), ("euler", "euler")])
def test_a_preset_for_the_unified_sampler_gets_it_unless_another_is_asked_for(asked: str, taken: str) -> None:
    assert from_host_kwargs({"unified_solver": True}, {"sample_solver": asked}).sampler == taken


@pytest.mark.parametrize(
    ("guide", "nag", "guided", "with_nag"),
    [(0, 1, False, False), (0, 4, False, True), (1, 4, False, True), (1, 1, True, False), (4, 4, True, False)],
)
def test_nag_works_without_guidance_and_guidance_without_nag(
    guide: float, nag: float, guided: bool, with_nag: bool
) -> None:
    request = from_host_kwargs({}, {"guide_scale": guide, "NAG_scale": nag, "NAG_tau": 2.5, "NAG_alpha": 0.25})

    assert (request.guidance.scale > 0, request.nag.active) == (guided, with_nag)
    assert request.needs_negative == (guided or with_nag)
    if with_nag:
        assert (request.nag.scale, request.nag.tau, request.nag.alpha) == (4, 2.5, 0.25)


def test_zero_is_a_number_and_none_is_not() -> None:
    request = from_host_kwargs({}, {"NAG_scale": 4, "NAG_tau": 0, "NAG_alpha": None, "diversity_end": 0})

    assert (request.nag.tau, request.nag.alpha, request.diversity.end) == (0, 0.5, 0)


def test_every_picture_of_a_batch_has_its_own_variation_seed() -> None:
    request = from_host_kwargs({}, {"seed": 5, "batch_size": 2, "variation_strength": 0.2, "variation_seed": 30})

    assert request.variation is not None
    assert (request.variation.strength, request.variation.seeds) == (0.2, (30, 31))


def test_schedules_are_chosen_by_name_or_typed() -> None:
    beta = from_host_kwargs({}, {"schedule": "beta", "sampling_steps": 4})
    typed = from_host_kwargs({}, {"sigmas": [1, 0.6, 0.2], "sampling_steps": 8})
    fixed = from_host_kwargs({}, {"sample_solver": "unified_2s", "sampling_steps": 8})

    assert beta.noise_levels() == schedules.beta(4, 3.0)
    assert typed.noise_levels() == [1, 0.6, 0.2, 0]
    assert fixed.noise_levels() == pytest.approx([0.999, 0.6, 0])


@pytest.mark.parametrize(
    ("request_with", "says"),
    [
        ({"sampler": "eular"}, r"no sampler 'eular'.*euler"),
        ({"schedule": "betta"}, r"no schedule 'betta'.*beta"),
        ({"variation": Variation(0.5, (1, 2))}, "2 variation seeds for 1 pictures"),
    ],
)
def test_unknown_names_list_the_known_ones(request_with: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        GenerateRequest(prompt="x", **request_with)


def test_typed_sigmas_that_rise_are_refused_with_an_example() -> None:
    with pytest.raises(UserError, match=r"numbers that fall.*got \[0.5, 0.7\].*Example"):
        GenerateRequest(prompt="x", sigmas=(0.5, 0.7)).noise_levels()

"""Host keywords become a request, or an error that says what to do."""

from __future__ import annotations

import pytest

from models.z_image.request import GenerateRequest, from_host_kwargs
from shared.quant.errors import UserError


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
        ({"NAG_scale": 3.0}, "NAG"),
        ({"input_frames": object()}, "control picture"),
    ],
)
def test_what_cannot_be_drawn_is_said(kwargs: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        from_host_kwargs({}, kwargs)


def test_a_preset_for_the_unified_sampler_is_refused() -> None:
    with pytest.raises(UserError, match="unified sampler"):
        from_host_kwargs({"unified_solver": True}, {})

"""Step caching: what it leaves out, how far off that is, and that it says so."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.z_image.guidance import ClassifierFreeGuidance, NormalizedAttentionGuidance
from models.z_image.prediction import Predictor, Prompts
from models.z_image.request import GenerateRequest
from models.z_image.step_cache import StepCache
from models.z_image.transformer import Captions
from shared.quant.errors import UserError

STEPS = 20
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
CAPTIONS = Captions(torch.zeros(1, 32, 8), (32,))
Field = Callable[[Tensor], Tensor]


def start() -> Tensor:
    return torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def curved(latents: Tensor) -> Tensor:
    """A velocity that turns with the place, by a fifth over the whole way."""
    return 1 + 0.2 * latents


def predictor(field: Field, cache: StepCache | None, *, guided: bool = False) -> Predictor:
    def network(latents: Tensor, *_: Any, **__: Any) -> Tensor:
        return -field(latents)  # it answers x0 - noise

    transformer: Any = network
    return Predictor(
        transformer, Prompts(positive=CAPTIONS, negative=CAPTIONS if guided else None), sigmas=SIGMAS,
        guidance=ClassifierFreeGuidance(scale=2.0 if guided else 0.0), nag=NormalizedAttentionGuidance(), cache=cache,
    )  # fmt: skip


def walk(predict: Predictor) -> Tensor:
    latents = start()
    for now, following in pairwise(SIGMAS):
        latents = latents + (following - now) * predict(latents, now)
    return latents


def test_on_a_straight_path_two_forwards_draw_the_picture() -> None:
    predict = predictor(torch.ones_like, StepCache(0.01))

    drawn = walk(predict)

    torch.testing.assert_close(drawn, start() - 1)
    assert (predict.forwards, predict.saved) == (2, STEPS - 2)


@pytest.mark.parametrize("threshold", [0.025, 0.05])
def test_what_is_used_again_is_off_by_no_more_than_the_threshold(threshold: float) -> None:
    exact = predictor(curved, None)
    predict = predictor(curved, StepCache(threshold))
    errors = []

    def difference(latents: Tensor) -> float:
        true = exact(latents, 0.5)
        given = predict(latents, 0.5)
        return float((given - true).abs().mean() / true.abs().mean())

    latents = start()
    for now, following in pairwise(SIGMAS):
        errors.append(difference(latents))
        latents = latents + (following - now) * curved(latents)

    assert 0 < predict.saved < STEPS - 2
    assert predict.forwards + predict.saved == STEPS
    assert 0 < max(errors) <= threshold * 1.05


def test_a_larger_threshold_leaves_out_more() -> None:
    runs = [predictor(curved, StepCache(threshold)) for threshold in (1e-6, 0.025, 0.05)]
    for run in runs:
        walk(run)

    saved = [run.saved for run in runs]
    assert saved[0] == 0 and saved == sorted(set(saved))


def test_nothing_is_used_of_another_prompt_or_other_strengths() -> None:
    strengths = [1.0]
    predict = predictor(torch.ones_like, StepCache(0.1, lambda: tuple(strengths)))
    path = [start() * scale for scale in (1.0, 0.9, 0.8, 0.7)]
    for latents in path:
        predict(latents, 0.5)
    assert predict.forwards == 2

    strengths[0] = 0.5
    predict(path[0], 0.5)
    assert predict.forwards == 3

    predict(path[1], 0.5)
    predict(path[2], 0.5)
    assert predict.forwards == 4
    predict.set_prompts(Prompts(positive=Captions(torch.ones(1, 32, 8), (32,))))
    predict(path[3], 0.5)
    assert predict.forwards == 5


def test_a_guided_step_left_out_saves_two_forwards() -> None:
    predict = predictor(torch.ones_like, StepCache(0.1), guided=True)

    walk(predict)

    assert (predict.forwards, predict.saved) == (4, 2 * (STEPS - 2))


def test_numbers_that_are_none_are_computed() -> None:
    predict = predictor(lambda latents: latents * float("nan"), StepCache(0.1))

    walk(predict)

    assert (predict.forwards, predict.saved) == (STEPS, 0)


def test_an_error_that_leaves_nothing_of_the_picture_is_refused() -> None:
    with pytest.raises(UserError, match="step cache"):
        GenerateRequest(prompt="x", step_cache=1.0)


def test_a_picture_of_the_demo_says_that_it_is_lossy_and_counts_true(tmp_path: Path) -> None:
    import argparse

    from shared.app.context import AppContext
    from shared.app.events import Event, Status
    from shared.app.families import load_families
    from shared.app.settings import GenerationSettings

    program = Path(__file__).parents[3]
    ctx = AppContext.create(
        argparse.Namespace(gpu="cpu", config=str(tmp_path), prompt_cache=0), program, load_families(program / "models")
    )
    preset = ctx.presets.get("z_image_demo")
    told: list[Event] = []

    def draw(**settings: Any) -> tuple[Any, dict[str, Any], int]:
        asked = {"prompt": "a red circle on a white ground", "seed": 1, "resolution": "128x128", **settings}
        result = ctx.session.generate(
            preset, GenerationSettings.build(preset, {}, asked), output=tmp_path / "p.png", on_event=told.append
        )
        from PIL import Image

        with Image.open(result.images[0].path) as picture:
            pixels = torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.float32)
        return pixels, result.images[0].record, result.forwards

    plain, record, forwards = draw()
    assert forwards == 8 and "lossy" not in record["provenance"] and "step_cache" not in record

    cached, record, forwards = draw(step_cache=0.2)
    words = f"step cache 0.2: {8 - forwards} of 8 forwards left out"

    assert 2 <= forwards < 8
    assert record["step_cache"] == 0.2 and record["provenance"]["lossy"] == words
    assert record["provenance"]["forwards"] == forwards
    assert Status(f"Lossy: {words}") in told
    assert 0 < float((cached - plain).abs().mean()) < 12  # of 255: another picture of the same thing

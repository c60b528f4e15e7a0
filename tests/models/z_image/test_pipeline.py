"""The whole way from prompt to latents against diffusers' ZImagePipeline, and what a generation promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline as ReferencePipeline

from models.z_image.conditions import Beginning
from models.z_image.diversity import Diversity
from models.z_image.guidance import ClassifierFreeGuidance, NormalizedAttentionGuidance
from models.z_image.noise import Variation, noise, slerp
from models.z_image.pipeline import ZImagePipeline
from models.z_image.request import GenerateRequest
from models.z_image.z_image_main import model_factory
from shared import samplers
from shared.quant.errors import NumbersError
from tests.support.tiny_model import relative_error


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> ZImagePipeline:
    return model_factory(model_filename=model_folder / "transformer.safetensors", dtype=torch.float32).pipeline


def latents_of(pipeline: ZImagePipeline, request: GenerateRequest) -> torch.Tensor:
    return list(pipeline.denoise(request, *pipeline.encode(request)))[-1].latents


@pytest.mark.parametrize(
    ("guidance", "theirs"),
    [
        pytest.param(ClassifierFreeGuidance(), {"guidance_scale": 0.0}, id="turbo"),
        pytest.param(ClassifierFreeGuidance(scale=4.0), {"guidance_scale": 4.0}, id="cfg"),
        pytest.param(
            ClassifierFreeGuidance(scale=3.0, normalization=1.0, truncation=0.5),
            {"guidance_scale": 3.0, "cfg_normalization": 1.0, "cfg_truncation": 0.5},
            id="cfg, normalised and truncated",
        ),
    ],
)
def test_eight_forwards_agree_with_diffusers(
    pipeline: ZImagePipeline,
    reference_pipeline: ReferencePipeline,
    guidance: ClassifierFreeGuidance,
    theirs: dict,
) -> None:
    request = GenerateRequest(
        prompt="a red fox in the snow",
        negative_prompt="blur",
        width=64,
        height=96,
        seeds=(5, 6),
        guidance=guidance,
    )

    ours = latents_of(pipeline, request)
    expected = reference_pipeline(
        prompt=["a red fox in the snow"] * 2, negative_prompt=["blur"] * 2, width=64, height=96, num_inference_steps=8,
        latents=noise(request.seeds, 96, 64, 16), output_type="latent", return_dict=False, **theirs,
    )[0]  # fmt: skip

    assert relative_error(ours, expected) <= 1e-4


def test_decoded_pictures_agree_with_diffusers(pipeline: ZImagePipeline, reference_pipeline: ReferencePipeline) -> None:
    request = GenerateRequest(prompt="a boat", width=48, height=32, seeds=(3,), steps=2)

    ours = pipeline(request)
    expected = reference_pipeline(
        prompt="a boat", width=48, height=32, num_inference_steps=2, guidance_scale=0.0,
        latents=noise((3,), 32, 48, 16), output_type="pt", return_dict=False,
    )[0]  # fmt: skip

    torch.testing.assert_close(ours / 2 + 0.5, expected, rtol=0, atol=1e-4)


def test_latents_that_memory_ran_out_for_wait_to_be_decoded(
    pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerateRequest(prompt="a boat", width=64, height=32, seeds=(3, 4), steps=2)
    expected = pipeline(request)
    decode = pipeline.decode

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline, "decode", fail)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline(request)
    monkeypatch.setattr(pipeline, "decode", decode)
    monkeypatch.setattr(pipeline, "denoise", None)  # nothing is drawn any more

    again = pipeline.decode_drawn(tile=4)

    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)
    assert pipeline.report.forwards == 2
    assert pipeline.decode_drawn(tile=4) is None


def test_an_image_of_a_batch_is_the_image_of_its_own_seed(pipeline: ZImagePipeline) -> None:
    together = pipeline(GenerateRequest(prompt="x", width=32, height=32, seeds=(7, 8), steps=2))
    alone = pipeline(GenerateRequest(prompt="x", width=32, height=32, seeds=(8,), steps=2))

    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4)


def test_the_same_seed_gives_identical_pixels(pipeline: ZImagePipeline) -> None:
    request = GenerateRequest(prompt="x", width=32, height=32, seeds=(7,), steps=3)

    assert torch.equal(pipeline(request), pipeline(request))


def test_steps_are_forwards_and_guided_steps_count_twice(pipeline: ZImagePipeline) -> None:
    pipeline(GenerateRequest(prompt="x", width=32, height=32, steps=3))
    plain = pipeline.report.forwards
    guided = GenerateRequest(prompt="x", width=32, height=32, steps=3, guidance=ClassifierFreeGuidance(scale=2.0))
    pipeline(guided)

    assert (plain, pipeline.report.forwards) == (3, 6)
    assert set(pipeline.report.seconds) == {"text", "denoise", "decode"}


@pytest.mark.parametrize(
    ("request_with", "forwards"),
    [
        pytest.param({"sampler": "heun"}, 5, id="heun"),
        pytest.param({"sampler": "unified_2s"}, 2, id="a sampler of fixed steps"),
        pytest.param({"sigmas": (1.0, 0.4)}, 2, id="typed sigmas"),
        pytest.param({"nag": NormalizedAttentionGuidance(4.0)}, 3, id="NAG is one call"),
        pytest.param({"guidance": ClassifierFreeGuidance(2.0, truncation=0.3)}, 5, id="guidance that stops early"),
    ],
)
def test_forwards_are_counted_as_they_happen(pipeline: ZImagePipeline, request_with: dict, forwards: int) -> None:
    latents_of(pipeline, GenerateRequest(prompt="x", width=32, height=32, steps=3, **request_with))

    assert pipeline.report.forwards == forwards


@pytest.mark.parametrize("sampler", ["lcm", "er_sde", "unified", "dpmpp_2m", "res_multistep", "heun"])
def test_a_sampler_draws_an_image_alone_as_in_a_batch(pipeline: ZImagePipeline, sampler: str) -> None:
    def draw(*seeds: int) -> torch.Tensor:
        return latents_of(
            pipeline, GenerateRequest(prompt="x", width=32, height=32, seeds=seeds, steps=3, sampler=sampler)
        )

    torch.testing.assert_close(draw(7, 8)[1:], draw(8), rtol=0, atol=1e-4)


def test_guided_answers_one_after_the_other_are_those_of_one_call(
    pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request = GenerateRequest(
        prompt="a red fox", negative_prompt="blur " * 20, width=32, height=32, seeds=(1, 2), steps=2,
        guidance=ClassifierFreeGuidance(scale=3.0),
    )  # fmt: skip
    together = latents_of(pipeline, request)
    sizes: list[int] = []
    forward = pipeline.transformer.forward

    def of_a_small_gpu(latents: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        sizes.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("too much")
        return forward(latents, *args, **kwargs)

    monkeypatch.setattr(pipeline.transformer, "forward", of_a_small_gpu)

    torch.testing.assert_close(latents_of(pipeline, request), together, rtol=1e-4, atol=1e-4)
    assert sizes == [4, 2, 2, 2, 2]
    assert pipeline.report.forwards == 4
    assert len([r for r in caplog.records if "one after the other" in r.message]) == 1


def test_nag_needs_a_negative_prompt_that_differs(pipeline: ZImagePipeline) -> None:
    """With both prompts alike, both views see the same: the extrapolation adds nothing."""

    def draw(negative: str, scale: float) -> torch.Tensor:
        return latents_of(
            pipeline,
            GenerateRequest(
                prompt="a red fox", negative_prompt=negative, width=128, height=128, steps=2,
                nag=NormalizedAttentionGuidance(scale),
            ),
        )  # fmt: skip

    plain = draw("", 1.0)

    torch.testing.assert_close(draw("a red fox", 5.0), plain, rtol=0, atol=1e-4)
    assert relative_error(draw("blur and noise", 5.0), plain) > 1e-3


def test_a_variation_lies_between_its_two_seeds(pipeline: ZImagePipeline) -> None:
    def draw(seed: int, variation: Variation | None = None) -> torch.Tensor:
        request = GenerateRequest(prompt="x", width=32, height=32, seeds=(seed,), variation=variation, steps=2)
        return latents_of(pipeline, request)

    assert torch.equal(draw(3, Variation(0.0, (9,))), draw(3))
    torch.testing.assert_close(draw(3, Variation(1.0, (9,))), draw(9))
    near = draw(3, Variation(0.1, (9,)))
    assert 0 < relative_error(near, draw(3)) < relative_error(near, draw(9))


def test_slerp_keeps_the_spread_of_noise() -> None:
    a, b = torch.randn(2, 16, 32, 32)

    assert [float(slerp(a, b, s).std()) for s in (0.25, 0.5)] == pytest.approx([1, 1], abs=0.02)


def test_diversity_disturbs_the_first_steps_only_and_repeats_with_the_seed(pipeline: ZImagePipeline) -> None:
    def steps(seed: int, diversity: Diversity) -> list[torch.Tensor]:
        request = GenerateRequest(prompt="x", width=32, height=32, seeds=(seed,), steps=4, diversity=diversity)
        return [step.latents for step in pipeline.denoise(request, *pipeline.encode(request))]

    plain, disturbed = steps(3, Diversity()), steps(3, Diversity(0.8, end=0.5))

    assert relative_error(disturbed[0], plain[0]) > 1e-6
    assert torch.equal(disturbed[-1], steps(3, Diversity(0.8, end=0.5))[-1])
    assert torch.equal(steps(3, Diversity(0.8, end=0.0))[-1], plain[-1])


def test_diversity_noise_differs_by_seed_and_follows_the_features_size() -> None:
    features = torch.randn(50, 200)
    features[:, 0] = 1000  # as some channels of a text encoder are

    changes = [Diversity(0.5).disturb(features, seed) - features for seed in (1, 2)]

    assert float(changes[0].std()) == pytest.approx(0.5, rel=0.1)
    assert float((changes[0] * changes[1]).mean()) == pytest.approx(0, abs=0.02)


class FromPicture:
    """A start that keeps the left half of known latents and begins one step late."""

    def __init__(self) -> None:
        self.known = torch.zeros(0)

    def begin(self, noise: torch.Tensor, sigmas: Sequence[float], encode: Callable) -> Beginning:
        self.known = encode(torch.zeros(1, 3, 32, 32))
        left = torch.zeros_like(noise)
        left[..., : noise.shape[-1] // 2] = 1
        begin = sigmas[1]

        def constrain(latents: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
            return left * (latents - self.known) / sigma + (1 - left) * velocity

        return Beginning(sigmas[1:], (1 - begin) * self.known + begin * noise, constrain)

    def finish(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.clamp(-1, 0)


@pytest.mark.parametrize("sampler", [name for name in samplers.names() if name not in ("default", "twinflow")])
def test_a_start_picks_its_part_of_the_schedule_and_what_it_keeps_stays_with_every_sampler(
    pipeline: ZImagePipeline, sampler: str
) -> None:
    start = FromPicture()
    request = GenerateRequest(prompt="x", width=32, height=32, steps=4, sampler=sampler, schedule="simple", start=start)
    totals: list[int] = []

    *_, last = pipeline.denoise(request, *pipeline.encode(request), totals.append)

    torch.testing.assert_close(last.latents[..., :2], start.known[..., :2], rtol=0, atol=1e-5)
    assert totals == [last.total] == [len(request.noise_levels()) - 2]


def test_the_steps_are_announced_before_the_network_is_asked_anything(
    pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    refine = pipeline.transformer.encode_captions
    monkeypatch.setattr(
        pipeline.transformer, "encode_captions", lambda f, **how: (order.append("captions"), refine(f, **how))[1]
    )
    request = GenerateRequest(prompt="x", width=32, height=32, steps=1)

    list(pipeline.denoise(request, *pipeline.encode(request), lambda steps: order.append(f"{steps} steps")))

    assert order == ["1 steps", "captions"]


def test_a_start_has_the_last_word_on_the_pictures(pipeline: ZImagePipeline) -> None:
    pictures = pipeline(GenerateRequest(prompt="x", width=32, height=32, steps=3, start=FromPicture()))

    assert float(pictures.max()) <= 0


def test_a_control_is_asked_for_its_signal_at_each_forward(pipeline: ZImagePipeline) -> None:
    asked: list[float] = []

    class Nothing:
        def begin(self, encode: Callable) -> Callable:
            return asked.append  # which returns None: no signal

    latents_of(pipeline, GenerateRequest(prompt="x", width=32, height=32, steps=4, control=Nothing()))

    assert asked == [0, 0.25, 0.5, 0.75]


def test_stopping_between_steps_returns_nothing(pipeline: ZImagePipeline) -> None:
    seen: list[int] = []

    result = pipeline(
        GenerateRequest(prompt="x", width=32, height=32, steps=5),
        lambda step: seen.append(step.index),
        lambda: len(seen) == 2,
    )

    assert result is None
    assert seen == [0, 1]


def test_not_a_number_is_named_and_not_drawn(model_folder: Path) -> None:
    broken = model_factory(model_filename=model_folder / "transformer.safetensors", dtype=torch.float32).pipeline
    broken.transformer.final_layer.linear.bias.data.fill_(float("nan"))

    with pytest.raises(NumbersError, match="infinite numbers in the latents after step 1 of 1"):
        broken(GenerateRequest(prompt="x", width=32, height=32, steps=1))

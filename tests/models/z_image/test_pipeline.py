"""The whole way from prompt to latents against diffusers' ZImagePipeline, and what a generation promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline as ReferencePipeline

from models.z_image.guidance import ClassifierFreeGuidance
from models.z_image.noise import noise
from models.z_image.pipeline import ZImagePipeline
from models.z_image.request import GenerateRequest
from models.z_image.z_image_main import model_factory
from shared.quant.errors import RunError, UserError
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

    with pytest.raises(RunError, match="latents after the last step hold NaN"):
        broken(GenerateRequest(prompt="x", width=32, height=32, steps=1))


def test_an_unknown_sampler_lists_the_known_ones(pipeline: ZImagePipeline) -> None:
    with pytest.raises(UserError, match=r"no sampler 'eular'.*euler"):
        pipeline(GenerateRequest(prompt="x", width=32, height=32, sampler="eular"))

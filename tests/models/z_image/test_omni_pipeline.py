"""Drawing by reference pictures agrees with diffusers' ZImageOmniPipeline, from the pictures to the latents."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageOmniPipeline, ZImageTransformer2DModel
from PIL import Image
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen3Model, Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from models.z_image.noise import noise
from models.z_image.omni_pipeline import load_siglip, prompt_pieces, shown_as
from models.z_image.z_image_main import model_factory
from shared.quant.errors import CheckpointError, UserError
from tests.support.tiny_model import TINY, randomise, relative_error

SEED, WIDTH, HEIGHT = 3, 48, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """An Omni model as diffusers lays it out, but for the demo's way of keeping the text encoder."""
    folder = tmp_path_factory.mktemp("omni")
    shutil.copytree(model_folder / "text_encoder", folder / "text_encoder")
    shutil.copytree(model_folder / "vae", folder / "vae")
    config = {k: v for k, v in replace(TINY, siglip_feat_dim=48).as_diffusers().items() if not k.startswith("_")}
    save_file(randomise(ZImageTransformer2DModel(**config), 5).state_dict(), folder / "transformer.safetensors")
    torch.manual_seed(6)
    sizes = Siglip2VisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, patch_size=4, num_patches=16
    )
    Siglip2VisionModel(sizes).save_pretrained(folder / "siglip")
    Siglip2ImageProcessorPil(patch_size=4, max_num_patches=20).save_pretrained(folder / "siglip_processor")
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> model_factory:
    return model_factory(model_filename=str(folder / "transformer.safetensors"), dtype=torch.float32)


@pytest.fixture
def theirs(
    folder: Path,
    reference_encoder: Qwen3Model,
    reference_vae: AutoencoderKL,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> ZImageOmniPipeline:
    from safetensors.torch import load_file

    config = {k: v for k, v in replace(TINY, siglip_feat_dim=48).as_diffusers().items() if not k.startswith("_")}
    transformer = ZImageTransformer2DModel(**config).eval().requires_grad_(False)
    transformer.load_state_dict(load_file(folder / "transformer.safetensors"))
    # It gives the VAE bfloat16 whatever its type. Black and white are the same numbers in both.
    encode = reference_vae.encode
    monkeypatch.setattr(reference_vae, "encode", lambda pictures: encode(pictures.float()))
    pipeline = ZImageOmniPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False),
        vae=reference_vae, text_encoder=reference_encoder, tokenizer=tokenizer, transformer=transformer,
        siglip=Siglip2VisionModel.from_pretrained(folder / "siglip").eval(),
        siglip_processor=Siglip2ImageProcessorPil.from_pretrained(folder / "siglip_processor"),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def a_picture(width: int, height: int, seed: int) -> Image.Image:
    """Black and white squares of 8 pixels."""
    squares = np.random.default_rng(seed).integers(0, 2, (height // 8, width // 8)).astype(np.uint8) * 255
    return Image.fromarray(np.repeat(squares.repeat(8, 0).repeat(8, 1)[:, :, None], 3, axis=2))


def draw(processor: model_factory, prompt: str = "a red fox", **keywords: Any) -> torch.Tensor:
    """The latents after the last step, (16, h, w)."""
    seen: list[torch.Tensor] = []
    processor.generate(
        input_prompt=prompt, seed=SEED, width=WIDTH, height=HEIGHT, sampling_steps=2, **keywords,
        callback=lambda step, latents, *_: None if latents is None else seen.append(latents[:, 0].clone()),
    )  # fmt: skip
    return seen[-1]


@pytest.mark.parametrize(
    ("sizes", "guidance"),
    [
        ([], 0.0),
        ([(64, 80)], 0.0),
        ([(72, 64), (64, 80)], 0.0),  # 72 is cropped to 64 for the VAE, and SigLIP sees all of it
        ([(64, 80)], 3.0),
    ],
)
def test_drawings_agree_with_diffusers(
    ours: model_factory, theirs: ZImageOmniPipeline, sizes: list[tuple[int, int]], guidance: float
) -> None:
    pictures = [a_picture(*size, seed=i) for i, size in enumerate(sizes)]
    expected = theirs(
        image=pictures or None, prompt="a red fox", negative_prompt="blue", guidance_scale=guidance,
        num_inference_steps=2, height=HEIGHT, width=WIDTH, latents=noise((SEED,), HEIGHT, WIDTH, 16),
        output_type="latent", return_dict=False,
    )[0][0]  # fmt: skip

    latents = draw(ours, n_prompt="blue", guide_scale=guidance, input_ref_images=pictures)

    assert relative_error(latents, expected) <= 1e-5


def test_a_reference_changes_the_drawing_and_its_size_may_be_any(ours: model_factory) -> None:
    plain = draw(ours)

    changed = draw(ours, input_ref_images=[a_picture(88, 72, seed=1)])

    assert changed.shape == plain.shape
    assert relative_error(changed, plain) > 1e-3


def test_the_prompt_stands_behind_the_references_and_before_the_drawing() -> None:
    assert prompt_pieces("fox", 0) == ["<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"]
    assert prompt_pieces("fox", 2) == [
        "<|im_start|>user\n<|vision_start|>",
        "<|vision_end|><|vision_start|>",
        "<|vision_end|>fox<|im_end|>\n<|im_start|>assistant\n<|vision_start|>",
        "<|vision_end|><|im_end|>",
    ]


def test_a_large_reference_is_shown_with_as_many_pixels_as_the_drawing_has() -> None:
    assert shown_as(Image.new("RGB", (2048, 1024)), 512 * 256).size == (512, 256)
    assert shown_as(Image.new("RGB", (1024, 1024)), 512 * 256).size == (1024, 1024)


@pytest.mark.parametrize("size", [(63, 200), (64, 520)])
def test_a_reference_that_is_too_small_or_too_long_is_refused(ours: model_factory, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"{size[0]}x{size[1]} pixels cannot be used"):
        draw(ours, input_ref_images=[Image.new("RGB", size)])


@pytest.mark.parametrize(("keywords", "what"), [({"NAG_scale": 5.0}, "NAG"), ({"diversity": 0.5}, "diversity")])
def test_what_does_not_go_with_omni_is_named(ours: model_factory, keywords: dict[str, float], what: str) -> None:
    with pytest.raises(UserError, match=f"do not go with {what}"):
        draw(ours, **keywords)


def test_other_models_refuse_references(model_folder: Path) -> None:
    plain = model_factory(model_filename=str(model_folder / "transformer.safetensors"), dtype=torch.float32)

    with pytest.raises(UserError, match="does not look at reference pictures"):
        draw(plain, input_ref_images=[a_picture(64, 64, seed=1)])


def test_without_siglip_the_places_that_were_looked_at_are_named(folder: Path, tmp_path: Path) -> None:
    for part in ("text_encoder", "vae"):
        shutil.copytree(folder / part, tmp_path / part)
    shutil.copy(folder / "transformer.safetensors", tmp_path)
    alone = model_factory(model_filename=str(tmp_path / "transformer.safetensors"), dtype=torch.float32)

    draw(alone)  # without references it is not needed
    with pytest.raises(UserError, match=r"Reference pictures need SigLIP 2's weights.*siglip"):
        draw(alone, input_ref_images=[a_picture(64, 64, seed=1)])


def test_a_siglip_of_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "siglip", tmp_path / "siglip")
    save_file({"stranger": torch.zeros(1)}, tmp_path / "siglip" / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"tensors are missing"):
        load_siglip(tmp_path / "siglip")

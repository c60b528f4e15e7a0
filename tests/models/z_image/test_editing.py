"""Pictures as starts and controls: against diffusers' image-to-image, inpainting and control pipelines, float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImageTransformer2DModel,
)
from diffusers import ZImagePipeline as ReferencePipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file

from models.z_image.control_config import ControlConfig
from models.z_image.editing import ControlPicture, PictureStart, cells_to_repaint, conditions_from_host, part_to_run
from models.z_image.guidance import ClassifierFreeGuidance, NormalizedAttentionGuidance
from models.z_image.noise import noise
from models.z_image.pipeline import ZImagePipeline
from models.z_image.request import GenerateRequest
from models.z_image.z_image_main import model_factory
from shared.quant.errors import UserError
from tests.support.tiny_model import randomise, relative_error

WIDTH, HEIGHT = 48, 64
BRANCH_16 = ControlConfig(places=(0,), in_channels=16, refiner="plain")
BRANCH_33 = ControlConfig(places=(0,), in_channels=33, refiner="own", refiner_places=(0,))


@pytest.fixture(scope="module")
def branch(reference_transformer: ZImageTransformer2DModel) -> ZImageControlNetModel:
    """A 2.x branch whose refiner gives no hints, as diffusers' pipeline leaves them out of the trunk."""
    model = ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=33,
        add_control_noise_refiner="control_noise_refiner", dim=384, n_refiner_layers=1, n_heads=3, n_kv_heads=3,
    )  # fmt: skip
    randomise(model, 21)
    for name, parameter in model.named_parameters():
        if name.startswith("control_noise_refiner.0.after_proj"):
            parameter.data.mul_(1e-12)  # not zero: that would make it a 2.0
    return ZImageControlNetModel.from_transformer(model, reference_transformer)


@pytest.fixture(scope="module")
def pipeline(model_folder: Path, branch: ZImageControlNetModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("control") / "control.safetensors"
    save_file({n: t.contiguous() for n, t in branch.state_dict().items() if n.startswith("control_")}, path)
    files = [model_folder / "transformer.safetensors", path]
    return model_factory(model_filename=files, dtype=torch.float32)


def a_picture(seed: int = 1) -> torch.Tensor:
    """(3, H, W) of 8-bit levels in [-1, 1]: coarse blocks of colour."""
    blocks = np.random.default_rng(seed).integers(0, 256, (3, HEIGHT // 8, WIDTH // 8))
    levels = torch.from_numpy(blocks).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return levels.float() / 127.5 - 1


def a_mask() -> torch.Tensor:
    """(1, H, W): a rectangle on whole latent cells."""
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, 16:48, 8:32] = 1
    return mask


def request(**values: Any) -> GenerateRequest:
    return GenerateRequest(prompt="a fox", width=WIDTH, height=HEIGHT, seeds=(5,), steps=4, **values)


def latents_of(pipeline: ZImagePipeline, asked: GenerateRequest) -> torch.Tensor:
    return list(pipeline.denoise(asked, *pipeline.encode(asked)))[-1].latents


def reference(kind: type, pipe: ReferencePipeline, **extra: Any) -> Any:
    made = kind(**pipe.components, **extra)
    made.set_progress_bar_config(disable=True)
    return made


COMMON = {"prompt": "a fox", "width": WIDTH, "height": HEIGHT, "num_inference_steps": 4, "guidance_scale": 0.0}


@pytest.fixture
def encoder_without_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers draws the start picture's latents from the encoder's distribution; ours are its mode."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def unit(picture: torch.Tensor) -> torch.Tensor:
    return picture[None] / 2 + 0.5


@pytest.mark.usefixtures("encoder_without_chance")
@pytest.mark.parametrize("strength", [0.5, 0.6])
def test_image_to_image_agrees_with_diffusers(pipeline: Any, reference_pipeline: Any, strength: float) -> None:
    start = PictureStart(picture=a_picture(), strength=strength)

    ours = latents_of(pipeline.pipeline, request(start=start))
    # diffusers draws the noise itself: a generator of our seed gives the same.
    expected = reference(ZImageImg2ImgPipeline, reference_pipeline)(
        image=unit(a_picture()), strength=strength, generator=torch.Generator().manual_seed(5),
        output_type="latent", return_dict=False, **COMMON,
    )[0]  # fmt: skip

    assert relative_error(ours, expected) <= 1e-4


@pytest.mark.usefixtures("encoder_without_chance")
def test_inpainting_agrees_with_diffusers(pipeline: Any, reference_pipeline: Any) -> None:
    start = PictureStart(picture=a_picture(), strength=1.0, mask=a_mask())

    ours = latents_of(pipeline.pipeline, request(start=start))
    expected = reference(ZImageInpaintPipeline, reference_pipeline)(
        image=unit(a_picture()), mask_image=a_mask()[None], strength=1.0, generator=torch.Generator().manual_seed(5),
        output_type="latent", return_dict=False, **COMMON,
    )[0]  # fmt: skip

    assert relative_error(ours, expected) <= 1e-4


def test_control_with_inpainting_agrees_with_diffusers(pipeline: Any, reference_pipeline: Any, branch: Any) -> None:
    control = ControlPicture(channels=33, picture=a_picture(2), weight=0.8, repaint=a_picture(1), mask=a_mask())

    ours = latents_of(pipeline.pipeline, request(control=control))
    # This pipeline takes tensors as they are, without bringing them from [0, 1] to [-1, 1].
    expected = reference(ZImageControlNetInpaintPipeline, reference_pipeline, controlnet=branch)(
        control_image=a_picture(2)[None], image=a_picture(1)[None], mask_image=a_mask()[None],
        controlnet_conditioning_scale=0.8, latents=noise((5,), HEIGHT, WIDTH, 16),
        output_type="latent", return_dict=False, **COMMON,
    )[0]  # fmt: skip

    assert relative_error(ours, expected) <= 1e-4


# ------------------------------------------------------------------------------------------------ promises


def test_pixels_outside_the_mask_come_back_bit_for_bit(pipeline: Any) -> None:
    start = PictureStart(picture=a_picture(), mask=a_mask())

    drawn = pipeline.pipeline(request(start=start))[0]

    outside = ~a_mask().bool().expand(3, -1, -1)
    assert torch.equal(drawn[outside], a_picture()[outside])
    assert not torch.equal(drawn, a_picture())


def test_latents_of_the_kept_region_end_on_the_pictures_own(pipeline: Any) -> None:
    start = PictureStart(picture=a_picture(), mask=a_mask())

    ended = latents_of(pipeline.pipeline, request(start=start))

    known = pipeline.pipeline.encode_pictures(a_picture()[None])
    kept = ~cells_to_repaint(a_mask()).expand(1, 16, -1, -1)
    torch.testing.assert_close(ended[kept], known[kept], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "guided",
    [
        pytest.param({"guidance": ClassifierFreeGuidance(scale=2.0)}, id="cfg"),
        pytest.param({"nag": NormalizedAttentionGuidance(scale=3.0)}, id="nag"),
    ],
)
def test_control_goes_with_guidance_and_batches(pipeline: Any, guided: dict[str, Any]) -> None:
    control = ControlPicture(channels=33, picture=a_picture(2), weight=0.8)
    asked = replace(request(**guided), negative_prompt="a very long list of what should not be seen here", steps=2)

    together = latents_of(pipeline.pipeline, replace(asked, seeds=(4, 5), control=control))
    alone = latents_of(pipeline.pipeline, replace(asked, control=control))

    assert relative_error(together[1:], alone) <= 1e-4
    assert relative_error(alone, latents_of(pipeline.pipeline, asked)) > 0.01


def test_a_control_window_counts_steps(pipeline: Any) -> None:
    control = ControlPicture(channels=33, picture=a_picture(), start=0.25, end=0.75)

    signals = control.begin(pipeline.pipeline.encode_pictures)

    assert [signals(i / 4) is not None for i in range(4)] == [False, True, True, False]
    assert replace(control, end=1.0).begin(pipeline.pipeline.encode_pictures)(1.0) is not None


def test_without_inpainting_the_last_17_channels_are_0(pipeline: Any) -> None:
    context = ControlPicture(channels=33, picture=a_picture()).context(pipeline.pipeline.encode_pictures)

    assert torch.equal(context[:, :16], pipeline.pipeline.encode_pictures(a_picture()[None]))
    assert not context[:, 16:].any()


@pytest.mark.parametrize(
    ("steps", "strength", "run"), [(8, 1.0, 8), (8, 0.5, 4), (8, 0.3, 3), (4, 0.26, 2), (30, 0.01, 1)]
)
def test_strength_is_the_share_of_steps_rounded_up(steps: int, strength: float, run: int) -> None:
    assert len(part_to_run([1 - i / steps for i in range(steps + 1)], strength)) == run + 1


def test_strength_0_is_refused() -> None:
    with pytest.raises(UserError, match="leaves none of the 4 steps"):
        part_to_run([1.0, 0.8, 0.5, 0.2, 0.0], 0.0)


def test_a_cell_with_one_masked_pixel_is_repainted_whole() -> None:
    mask = torch.zeros(1, 16, 16)
    mask[0, 9, 3] = 1

    assert cells_to_repaint(mask).tolist() == [[[[False, False], [True, False]]]]


# ------------------------------------------------------------------------------------------------ a host's keywords


def host(branch: ControlConfig | None, **kwargs: Any) -> tuple[PictureStart | None, ControlPicture | None]:
    return conditions_from_host(kwargs, branch, width=WIDTH, height=HEIGHT)


def test_nothing_asked_is_nothing() -> None:
    assert host(BRANCH_33, input_frames=None, image_start=None, input_masks=None, denoising_strength=0.4) == (
        None,
        None,
    )


def test_a_hosts_control_frames_and_weight_reach_the_branch() -> None:
    start, control = host(BRANCH_16, input_frames=a_picture()[:, None], context_scale=[0.6])

    assert start is None
    assert control is not None
    assert (control.channels, control.weight, control.mask) == (16, 0.6, None)
    assert torch.equal(control.picture, a_picture())


def test_a_hosts_mask_repaints_its_control_frames_through_a_2_x_branch() -> None:
    start, control = host(
        BRANCH_33, input_frames=a_picture()[:, None], input_masks=a_mask()[:, None].repeat(3, 1, 1, 1)
    )

    assert start is not None
    assert start.free
    assert start.strength == 1.0
    assert torch.equal(start.mask, a_mask())
    assert control is not None
    assert torch.equal(control.repaint, a_picture())
    assert torch.equal(control.picture, a_picture())


def test_a_mask_and_a_start_picture_need_no_branch() -> None:
    start, control = host(None, image_start=a_picture(), input_masks=a_mask(), denoising_strength=0.7)

    assert control is None
    assert start is not None
    assert (start.strength, start.free) == (0.7, False)


def test_a_2_x_branch_inpaints_without_a_control_picture(pipeline: Any) -> None:
    _, control = host(BRANCH_33, image_start=a_picture(), input_masks=a_mask())

    assert control is not None
    context = control.context(pipeline.pipeline.encode_pictures)
    assert not context[:, :16].any()
    assert torch.equal(context[:, 16:17], 1 - a_mask()[None, :, ::8, ::8])


@pytest.mark.parametrize(
    ("branch", "kwargs", "says"),
    [
        (None, {"input_frames": a_picture()}, "no control branch"),
        (None, {"input_masks": a_mask()}, "a mask but no picture"),
        (BRANCH_16, {"input_frames": torch.zeros(3, 1, 8, 8)}, r"control picture is \[3, 8, 8\].*the drawing 48x64"),
        (None, {"image_start": a_picture(), "input_masks": torch.zeros(1, 8, 8)}, r"mask is \[1, 8, 8\]"),
        (BRANCH_16, {"input_frames": a_picture(), "control_start": 0.5, "control_end": 0.2}, "from 0.5 to 0.2"),
        (BRANCH_16, {"input_frames": a_picture(), "control_end": 1.5}, "to 1.5 of the steps is no window"),
    ],
)
def test_what_cannot_be_done_is_said(branch: ControlConfig | None, kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        host(branch, **kwargs)

"""Nobody waits for the GPU between the first step and the last, whatever is asked for.

A host that waits leaves the GPU without work until it has told it what comes next: milliseconds in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageControlNetModel
from safetensors.torch import save_file

from models.z_image.z_image_main import model_factory
from shared import samplers
from shared.app.offload import DirectPlacement
from shared.ops.upload import upload
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.garbage import quick_collections
from tests.support.packed_model import lora_file
from tests.support.tiny_model import TINY, randomise

SIDE, STEPS = 32, 4
PICTURE = torch.linspace(-1, 1, 3 * SIDE * SIDE).view(3, SIDE, SIDE)
MASK = torch.zeros(1, SIDE, SIDE)
MASK[:, 8:24, 8:24] = 1

KINDS: dict[str, dict[str, Any]] = {
    **{f"sampler {name}": {"sample_solver": name} for name in samplers.names() if not samplers.is_unified(name)},
    "a batch": {"batch_size": 2},
    "exact": {"precision": "exact"},
    "guidance that ends": {"n_prompt": "blue", "guide_scale": 2.0, "cfg_normalization": 1.0, "cfg_truncation": 0.5},
    "nag": {"n_prompt": "blue", "NAG_scale": 4.0},
    "control": {"input_frames": PICTURE[:, None], "context_scale": [0.8]},
    "control for some steps": {"input_frames": PICTURE[:, None], "context_scale": [0.8], "control_end": 0.5},
    "from a picture": {"image_start": PICTURE, "denoising_strength": 0.9},
    "inpainting": {"image_start": PICTURE, "input_masks": MASK, "denoising_strength": 0.9},
    "diversity": {"diversity": 0.5},
}


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """release() collects garbage; without this each time looks through all of torch and transformers."""
    with quick_collections():
        yield


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


@pytest.fixture(scope="module")
def model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> model_factory:
    branch = ZImageControlNetModel(
        control_layers_places=[0, 1], control_refiner_layers_places=[0], control_in_dim=33,
        add_control_noise_refiner="control_noise_refiner", dim=TINY.dim, n_refiner_layers=1, n_heads=3, n_kv_heads=3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("control") / "control.safetensors"
    save_file({n: t.contiguous() for n, t in randomise(branch, 31).state_dict().items()}, path)
    return model_factory(model_filename=[model_folder / "transformer.safetensors", path], dtype=torch.bfloat16)


def waits_of_later_steps(gpu: FakeCuda, model: model_factory, request: dict[str, Any]) -> list[str]:
    offloader = DirectPlacement("cuda")
    offloader.place({name: getattr(model, name) for name in ("transformer", "text_encoder", "vae")})
    model.device = offloader.device
    at_step: list[int] = []
    steps = STEPS

    def on_step(step: int, latents: torch.Tensor | None = None, _first: bool = False, total: int | None = None) -> None:
        nonlocal steps
        steps = total or steps  # fewer from a picture
        if latents is not None:
            at_step.append(len(gpu.waits))
        model._interrupt = step == steps - 1  # nothing is to be decoded

    asked = {"input_prompt": "a fox", "seed": 3, "sampling_steps": STEPS, "width": SIDE, "height": SIDE, **request}
    model._interrupt = False
    assert model.generate(**asked, callback=on_step) is None
    offloader.release()
    assert len(at_step) == steps > 1
    assert at_step[0] > 0  # the books are kept: prompts, noise and tables are brought before
    return gpu.waits[at_step[0] : at_step[-1]]


@pytest.mark.parametrize("request_", KINDS.values(), ids=KINDS)
def test_a_picture_is_drawn_without_waiting(gpu: FakeCuda, model: model_factory, request_: dict[str, Any]) -> None:
    assert waits_of_later_steps(gpu, model, request_) == []


def test_strengths_that_change_at_every_step_are_not_waited_for(
    gpu: FakeCuda, model: model_factory, tmp_path: Path
) -> None:
    lora = tmp_path / "lora.safetensors"
    lora_file(lora)
    model.load_loras([lora], [[[1.0, 0.75, 0.5, 0.25]]])

    assert waits_of_later_steps(gpu, model, {}) == []
    model.load_loras([], [])


def test_an_upload_is_queued_and_the_plain_way_is_waited_for(gpu: FakeCuda) -> None:
    values = torch.arange(6.0).view(2, 3)

    queued = upload(values, torch.device("cuda"))
    waits = list(gpu.waits)
    values.to("cuda")

    assert queued.is_cuda and torch.equal(queued.cpu(), values)
    assert waits == [] and gpu.waits == ["to", "cpu"]
    assert upload(values, torch.device("cpu")) is values

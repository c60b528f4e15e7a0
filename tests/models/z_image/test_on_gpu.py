"""The whole pipeline on a pretended GPU: the same picture as on the CPU, wherever the weights lie between calls."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.z_image.z_image_main import model_factory
from shared.app.offload import MIB, PROFILES, DirectPlacement, Offloader, Profile, weight_bytes
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.fake_lane import FakeLane
from tests.support.garbage import quick_collections
from tests.support.only_torch import only_torch

# Two captions of different length at once, a batch, guidance, and an oblong picture decoded in tiles.
REQUEST: dict[str, Any] = {
    "input_prompt": "a red circle on a green ground, in the upper left corner of the picture",
    "n_prompt": "blue",
    "seed": 7,
    "batch_size": 2,
    "width": 96,
    "height": 64,
    "precision": "exact",  # the fast tier decodes in another type on a CPU than on a GPU
    "sampling_steps": 3,  # times 0, 1/7 and 2/5: no round numbers in bfloat16
    "guide_scale": 2.0,
    "shift": 3.0,
    "VAE_tile_size": 48,
}

STREAMED = Profile(number=5, sentence="", resident={"*": 1}, pinned="none")


def load(folder: Path) -> model_factory:
    return model_factory(
        model_filename=folder / "transformer.safetensors", dtype=torch.bfloat16, VAE_dtype=torch.float32
    )


def modules_of(model: model_factory) -> dict[str, torch.nn.Module]:
    return {"transformer": model.transformer, "text_encoder": model.text_encoder, "vae": model.vae}


@pytest.fixture(scope="module", autouse=True)
def _by_torch() -> Iterator[None]:
    with only_torch():
        yield


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """mmgp collects garbage at every turn; without this each time looks through all of torch and transformers."""
    with quick_collections():
        yield


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> torch.Tensor:
    pictures = load(model_folder).generate(**REQUEST)
    assert pictures is not None
    return pictures


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def draw(model: model_factory, offloader: Offloader) -> torch.Tensor:
    offloader.place(modules_of(model))
    model.device = offloader.device
    pictures = model.generate(**REQUEST)
    assert pictures is not None
    return pictures.cpu()


@pytest.mark.parametrize("lane", [None, FakeLane], ids=["by torch", "by several threads"])
def test_all_weights_resident_draw_the_cpus_picture(
    model_folder: Path, gpu: FakeCuda, expected: torch.Tensor, lane: type[FakeLane] | None
) -> None:
    assert torch.equal(draw(load(model_folder), DirectPlacement("cuda", lane)), expected)


@pytest.mark.parametrize("number", PROFILES)
def test_every_mmgp_profile_draws_the_cpus_picture(
    model_folder: Path, gpu: FakeCuda, expected: torch.Tensor, number: float
) -> None:
    engine = pytest.importorskip("shared.app.mmgp_engine")

    assert torch.equal(draw(load(model_folder), engine.MmgpOffload(PROFILES[number])), expected)


def test_streamed_weights_draw_the_cpus_picture_with_a_part_of_them_on_the_gpu(
    model_folder: Path, gpu: FakeCuda, expected: torch.Tensor
) -> None:
    engine = pytest.importorskip("shared.app.mmgp_engine")
    model = load(model_folder)

    picture = draw(model, engine.MmgpOffload(STREAMED))

    assert torch.equal(picture, expected)
    whole = weight_bytes(model.transformer)
    assert gpu.peak < 0.9 * whole
    # Three steps and the captions: the blocks travel again and again.
    assert sum(gpu.uploads) > 2 * whole > 2 * MIB
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}


def test_after_release_the_cpu_draws_the_same_picture(
    model_folder: Path, gpu: FakeCuda, expected: torch.Tensor
) -> None:
    engine = pytest.importorskip("shared.app.mmgp_engine")
    model, offloader = load(model_folder), engine.MmgpOffload(STREAMED)
    draw(model, offloader)

    offloader.release()

    gc.collect()
    assert not any(t.is_cuda for module in modules_of(model).values() for t in module.state_dict().values())
    assert gpu.resident() < MIB / 2  # tables of rotary angles and prompt features, which the pipeline keeps
    assert torch.equal(draw(model, DirectPlacement("cpu")), expected)


@pytest.mark.parametrize("number", [1, 4])
def test_a_wan2gp_host_that_places_the_modules_itself_draws_the_cpus_picture(
    model_folder: Path, gpu: FakeCuda, expected: torch.Tensor, number: int
) -> None:
    """Its call of mmgp: LoRA slots in the transformer, float32 rounded to bfloat16, "cuda" left as default device."""
    pytest.importorskip("shared.app.mmgp_engine")  # also puts safetensors' own functions back
    from mmgp import offload

    model = load(model_folder)
    small = {"budgets": {"transformer": 1, "text_encoder": 1, "*": 3000}} if number == 4 else {}
    offload.profile(
        modules_of(model), profile_no=number, loras=["transformer"], quantizeTransformer=False,
        convertWeightsFloatTo=torch.bfloat16, verboseLevel=0, **small,
    )  # fmt: skip
    assert gpu.default_device.type == "cuda"
    model.device = torch.device("cuda")

    pictures = model.generate(**REQUEST)

    assert pictures is not None
    assert torch.equal(pictures.cpu(), expected)

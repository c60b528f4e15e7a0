"""A control branch on a pretended GPU, placed whole or streamed by mmgp: the CPU's picture, inpainting included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageControlNetModel
from safetensors.torch import save_file

from models.z_image.z_image_main import model_factory
from shared.app.offload import DirectPlacement, Offloader, Profile, weight_bytes
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.tiny_model import TINY, randomise

SIDE = 32
STREAMED = Profile(number=5, sentence="", resident={"transformer": 2, "*": 2}, pinned="none")
WHOLE = Profile(number=3, sentence="", resident={"*": 0}, pinned="none")


@pytest.fixture(scope="module")
def files(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    branch = ZImageControlNetModel(
        control_layers_places=[0, 1], control_refiner_layers_places=[0], control_in_dim=33,
        add_control_noise_refiner="control_noise_refiner", dim=TINY.dim, n_refiner_layers=1, n_heads=3, n_kv_heads=3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("control") / "control.safetensors"
    save_file({n: t.contiguous() for n, t in randomise(branch, 31).state_dict().items()}, path)
    return [model_folder / "transformer.safetensors", path]


def load(files: list[Path]) -> model_factory:
    torch.manual_seed(0)
    return model_factory(model_filename=files, dtype=torch.bfloat16)


def draw(model: model_factory, offloader: Offloader) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, 8:24, 8:24] = 1
    asked: dict[str, Any] = {
        "input_prompt": "a fox", "seed": 3, "sampling_steps": 2, "width": SIDE, "height": SIDE,
        "input_frames": torch.rand(3, 1, SIDE, SIDE, generator=generator) * 2 - 1,
        "image_start": torch.rand(3, SIDE, SIDE, generator=generator) * 2 - 1, "input_masks": mask,
        "denoising_strength": 1.0, "context_scale": [0.8],
    }  # fmt: skip
    modules = {name: getattr(model, name) for name in ("transformer", "text_encoder", "vae")}
    offloader.place(modules)
    model.device = offloader.device
    pictures = model.generate(**asked, precision="exact")  # the fast tier decodes in another type on a CPU
    assert pictures is not None
    return pictures.cpu()


@pytest.fixture(scope="module")
def expected(files: list[Path]) -> torch.Tensor:
    return draw(load(files), DirectPlacement("cpu"))


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def test_the_branch_is_a_part_of_the_transformer(files: list[Path]) -> None:
    model = load(files)

    assert model.transformer.control is not None
    assert weight_bytes(model.transformer) > 1.3 * weight_bytes(load(files[:1]).transformer)


def test_all_weights_resident_draw_the_cpus_picture(files: list[Path], gpu: FakeCuda, expected: torch.Tensor) -> None:
    assert torch.equal(draw(load(files), DirectPlacement("cuda")), expected)


@pytest.mark.parametrize("profile", [WHOLE, STREAMED], ids=["whole", "streamed"])
def test_mmgp_brings_the_branch_along(
    files: list[Path], gpu: FakeCuda, expected: torch.Tensor, profile: Profile
) -> None:
    engine = pytest.importorskip("shared.app.mmgp_engine")
    model = load(files)

    picture = draw(model, engine.MmgpOffload(profile))

    assert torch.equal(picture, expected)
    if profile is STREAMED:
        assert gpu.peak < 0.9 * weight_bytes(model.transformer)

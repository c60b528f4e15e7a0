"""Rows that stand apart in a file are not joined in RAM for a GPU: on the way there they come to lie as one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from models.z_image import loader
from models.z_image.z_image_main import model_factory
from shared.app.offload import DirectPlacement, Offloader
from shared.app.streamer import StreamOffload
from shared.quant import linear, mapping, pieces
from shared.quant.linear import JoinedLinear
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.fake_lane import FakeLane
from tests.support.garbage import quick_collections
from tests.support.packed_model import lora_file

REQUEST: dict[str, Any] = {
    "input_prompt": "a red circle", "seed": 7, "width": 32, "height": 32, "sampling_steps": 2, "shift": 3.0,
}  # fmt: skip
MIB = 2**20

OFFLOADERS: dict[str, Callable[[], Offloader]] = {
    "direct": lambda: DirectPlacement("cuda", FakeLane),
    "streamed": lambda: StreamOffload(budget=24 * MIB, lane=FakeLane),
    "streamed from locked RAM": lambda: StreamOffload(budget=24 * MIB, lock=1 << 30, lane=FakeLane),
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


@pytest.fixture
def as_one(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each product of parts was one."""
    found: list[bool] = []
    real = pieces.as_one

    def looked(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        tensor = real(tensors)
        if len(tensors) > 1:
            found.append(tensor is not None)
        return tensor

    monkeypatch.setattr(pieces, "as_one", looked)
    monkeypatch.setattr(linear, "as_one", looked)
    return found


def load(folder: Path, **options: Any) -> model_factory:
    return model_factory(model_filename=folder / "transformer.safetensors", dtype=torch.float32, **options)


def draw(model: model_factory, offloader: Offloader) -> torch.Tensor:
    offloader.place({name: getattr(model, name) for name in ("transformer", "text_encoder", "vae")})
    model.device = offloader.device
    picture = model.generate(**REQUEST)
    offloader.release()
    assert picture is not None
    return picture


@pytest.mark.parametrize("offloader", OFFLOADERS.values(), ids=OFFLOADERS)
def test_parts_that_are_laid_side_by_side_are_one_product(
    model_folder: Path,
    gpu: FakeCuda,
    as_one: list[bool],
    offloader: Callable[[], Offloader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = draw(load(model_folder), DirectPlacement("cuda"))
    assert not as_one  # a small file's parts are joined when it is loaded
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)
    model = load(model_folder, keep_apart=True)
    parts = [m for m in model.transformer.modules() if isinstance(m, JoinedLinear)]
    blocks = [*model.transformer.layers, *model.transformer.noise_refiner, *model.transformer.context_refiner]
    assert len(parts) == 2 * len(blocks)
    assert all(mapping.is_mapped(weight) for weight in model.transformer.parameters())

    drawn = draw(model, offloader())

    assert torch.equal(drawn, expected)
    assert as_one and all(as_one)


def test_a_lora_reaches_them_as_it_does_joined_ones(
    model_folder: Path, gpu: FakeCuda, as_one: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora_file(tmp_path / "lora.safetensors")
    pictures = []
    for options in ({}, {"keep_apart": True}):
        monkeypatch.setattr(loader, "MAPPED_FROM", 0 if options else 2**30)
        model = load(model_folder, **options)
        model.load_loras([tmp_path / "lora.safetensors"], [0.7])
        pictures.append(draw(model, DirectPlacement("cuda", FakeLane)))

    assert torch.equal(*pictures)
    assert as_one and all(as_one)


def test_parts_that_lie_elsewhere_are_products_of_their_own(gpu: FakeCuda, as_one: list[bool]) -> None:
    layer = JoinedLinear([torch.nn.Linear(16, 8, bias=False) for _ in range(3)]).requires_grad_(False)
    x = torch.randn(2, 16)
    expected = layer(x)

    layer.to("cuda")

    torch.testing.assert_close(layer(x.cuda()).cpu(), expected)
    assert as_one == [False]

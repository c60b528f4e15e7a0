"""What a model chooses when its device is known: an attention, and whether its forwards are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.z_image import z_image_main
from models.z_image.attention import attend
from models.z_image.block import Attention
from models.z_image.z_image_main import model_factory
from shared.ops.attention import BACKENDS, SDPA, Backend, Found

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> model_factory:
    return model_factory(model_filename=[str(model_folder / "transformer.safetensors")], dtype=torch.float32)


@pytest.fixture
def processor(loaded: model_factory) -> Iterator[model_factory]:
    yield loaded
    loaded.device = CPU
    loaded.prepare(["sdpa"], records=False)


def backends(processor: model_factory) -> set[str]:
    return {m.backend.name for m in processor.transformer.modules() if isinstance(m, Attention)}


def test_a_cpu_attends_by_torch_and_records_nothing(processor: model_factory) -> None:
    words = processor.prepare(["sdpa", "flash"], records=True)

    assert words == "attention by sdpa; forwards launched kernel by kernel"
    assert backends(processor) == {"sdpa"} and processor.pipeline.recordings is None


def test_a_gpu_takes_the_fastest_or_what_was_asked_for(
    processor: model_factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(z_image_main, "fastest", lambda *_: Found(BACKENDS["cudnn"], "sdpa 2 ms, cudnn 1 ms"))
    processor.device = GPU

    raced = processor.prepare(["sdpa", "cudnn"], records=True)
    assert raced == "attention by cudnn (sdpa 2 ms, cudnn 1 ms); forwards recorded"
    assert backends(processor) == {"cudnn"} and processor.pipeline.recordings is not None

    assert processor.prepare(["sage2"], records=False) == "attention by sage2; forwards launched kernel by kernel"
    assert backends(processor) == {"sage2"} and processor.pipeline.recordings is None


@pytest.mark.parametrize(("asked", "most"), [("", 2304), ("1", None)])
def test_small_forwards_are_recorded_or_all_or_none_as_asked_for(
    processor: model_factory, monkeypatch: pytest.MonkeyPatch, asked: str, most: int | None
) -> None:
    processor.device = GPU
    monkeypatch.setenv("ZIMAGE_GRAPHS", asked)

    processor.prepare(["sdpa"], records=True)
    assert processor.pipeline.recordings is not None and processor.pipeline.recordings.most_tokens == most

    monkeypatch.setenv("ZIMAGE_GRAPHS", "0")
    processor.prepare(["sdpa"], records=True)
    assert processor.pipeline.recordings is None


def test_a_backend_is_asked_where_nothing_is_masked_and_no_tier_forbids_it() -> None:
    asked: list[str] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked.append("backend")
        return SDPA.run(q, k, v)

    backend = Backend("other", run)
    q, k, v = (torch.randn(1, 2, 4, 16) for _ in range(3))
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)

    results = [
        attend(q, k, v, backend=backend),
        attend(q, k, v, mask, backend=backend),
        attend(q, k, v, exact=True, backend=backend),
    ]

    assert asked == ["backend"]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])

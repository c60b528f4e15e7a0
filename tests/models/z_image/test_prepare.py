"""What a model chooses when its device is known: an attention, and whether its forwards are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.z_image import z_image_main
from models.z_image.attention import attend
from models.z_image.cuda_graph import GraphedForwards
from models.z_image.transformer import Attention
from models.z_image.z_image_main import model_factory
from shared.ops.attention import BACKENDS, SDPA, Backend, Found
from tests.support.fake_graphs import FakeRecorder

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> model_factory:
    return model_factory(model_filename=[str(model_folder / "transformer.safetensors")], dtype=torch.float32)


@pytest.fixture
def processor(loaded: model_factory) -> Iterator[model_factory]:
    yield loaded
    loaded.device = CPU
    loaded.load_loras([], [])
    loaded.prepare(["sdpa"], records=False)


def backends(processor: model_factory) -> set[str]:
    return {m.backend.name for m in processor.transformer.modules() if isinstance(m, Attention)}


def draw(processor: model_factory, **kwargs: object) -> Tensor:
    picture = processor.generate(
        **{"input_prompt": "x", "seed": 1, "width": 32, "height": 48, "sampling_steps": 4} | kwargs
    )
    assert picture is not None
    return picture


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


def test_recordings_can_be_forbidden(processor: model_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_GRAPHS", "0")
    processor.device = GPU

    processor.prepare(["sdpa"], records=True)

    assert processor.pipeline.recordings is None


def test_pictures_from_recordings_are_the_same_bits(processor: model_factory, tmp_path: Path) -> None:
    base = "transformer.layers.0.feed_forward.w2"
    state = {f"{base}.lora_A.weight": torch.randn(8, 1024), f"{base}.lora_B.weight": torch.randn(384, 8)}
    save_file(state, tmp_path / "l.safetensors")

    def pictures() -> list[Tensor]:
        result = []
        for loras in ([], [tmp_path / "l.safetensors"], []):
            processor.load_loras(loras, [[[0.5], [1.0]]] * len(loras))  # another strength in the second half
            result += [draw(processor, seed=seed) for seed in (1, 2)]
        return result

    plain = pictures()
    recordings = processor.pipeline.recordings = GraphedForwards(processor.transformer, FakeRecorder())
    recorded = pictures()

    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert not torch.equal(plain[0], plain[2])
    assert recordings.replayed == 2 * 3 + 2 * 2 + 2 * 3  # of 4 forwards, the first of a time or strength goes ahead


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

"""The whole program on a pretended GPU: a session loads the demo, brings it there and draws, whatever moves it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import transformers  # noqa: F401 - imported before a GPU is pretended, which they look for
from diffusers.models.autoencoders import autoencoder_kl  # noqa: F401
from PIL import Image

import wgp
from models.z_image import loader
from shared.app import streamer
from shared.app.context import AppContext
from shared.app.settings import GenerationSettings
from shared.quant.linear import JoinedLinear
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.fake_lane import FakeLane


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    monkeypatch.setenv("ZIMAGE_GRAPHS", "0")  # neither recordings nor Triton are pretended
    monkeypatch.setenv("ZIMAGE_TRITON", "0")
    monkeypatch.setattr(streamer, "CudaLane", FakeLane)
    monkeypatch.setattr(streamer, "StreamOffload", partial(streamer.StreamOffload, lane=FakeLane))
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)  # as a file of the real size is loaded
    with fake_cuda() as device:
        yield device


def draw(tmp_path: Path, offload: str) -> tuple[np.ndarray, int]:
    """Its pixels, and how many linears of the transformer were left apart."""
    args = wgp.parse(["--offload", offload, "--prompt-cache", "0", "--attention", "sdpa", "generate", "x"])
    ctx = AppContext.create(args, wgp.ROOT, args.families)
    preset = ctx.presets.get("z_image_demo")
    asked = {"prompt": "a red circle", "resolution": "64x64", "num_inference_steps": 2, "seed": 1, "precision": "exact"}
    apart = 0

    def look(_event: object) -> None:
        nonlocal apart
        model = ctx.session._model._model
        if model is not None and "transformer" in model.modules:
            apart = sum(isinstance(m, JoinedLinear) for m in model.modules["transformer"].modules())

    result = ctx.session.generate(
        preset, GenerationSettings.build(preset, {}, asked), output=tmp_path / f"{offload}.png", on_event=look
    )
    ctx.session.release()
    assert result.images[0].record["provenance"]["device"] == "Pretended GPU" and not result.notes
    with Image.open(result.images[0].path) as image:
        return np.asarray(image), apart


def test_weights_that_stay_and_weights_that_are_streamed_draw_the_same_picture(gpu: FakeCuda, tmp_path: Path) -> None:
    resident, apart = draw(tmp_path, "none")
    streamed, _ = draw(tmp_path, "stream")

    assert np.array_equal(resident, streamed)
    assert resident.std() > 1  # of a picture
    assert apart > 0  # rows were not joined in RAM

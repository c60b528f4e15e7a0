"""Where a decoder and its quick copy lie, and that each decode finds the one it wants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.z_image import autoencoder, quick_decoder
from models.z_image.banded_decoder import BandedDecoder
from models.z_image.decoding import Decoding
from models.z_image.z_image_main import model_factory
from shared.app.offload import PROFILES, DirectPlacement
from tests.support.fake_cuda import FakeCuda, fake_cuda, on_gpu
from tests.support.only_torch import only_torch

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _by_torch() -> Iterator[None]:
    with only_torch(), torch.no_grad():
        yield


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def load(folder: Path) -> Any:
    return autoencoder.load_vae(folder / "vae", torch.float32)


def latents(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 16, 6, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exact(model_folder: Path) -> torch.Tensor:
    vae = load(model_folder)
    return torch.cat([autoencoder.decode(vae, z[None]) for z in latents()])


@pytest.fixture(scope="module")
def rounded(model_folder: Path) -> torch.Tensor:
    vae = load(model_folder)
    return autoencoder.decode(vae, latents(), 0, BandedDecoder(vae, CPU))


def test_where_weights_stay_only_one_decoder_is_on_the_gpu(
    model_folder: Path, gpu: FakeCuda, exact: torch.Tensor, rounded: torch.Tensor
) -> None:
    decoding = Decoding(load(model_folder).to("cuda"))
    decoding.stays = True
    z = latents().to("cuda")

    quick = decoding.decode(z, 0, GPU, quick=True)

    assert torch.equal(quick, rounded)
    assert not any(on_gpu(p) for p in decoding.vae.decoder.parameters())
    assert all(on_gpu(p) for p in decoding.vae.encoder.parameters())
    kept = decoding._quick
    assert torch.equal(decoding.decode(z, 0, GPU, quick=True), rounded)
    assert decoding._quick is kept

    plain = decoding.decode(z, 0, GPU, quick=False)

    assert torch.equal(plain, exact)
    assert decoding._quick is None
    assert all(on_gpu(p) for p in decoding.vae.decoder.parameters())
    assert torch.equal(decoding.decode(z, 0, GPU, quick=True), rounded)


def test_where_weights_are_moved_the_copy_visits_the_gpu_part_by_part(
    model_folder: Path, gpu: FakeCuda, rounded: torch.Tensor
) -> None:
    decoding = Decoding(load(model_folder))  # in RAM: whoever moves weights is not asked for it
    z = latents().to("cuda")
    before = gpu.resident()

    found = decoding.decode(z, 0, GPU, quick=True)

    assert torch.equal(found, rounded)
    assert gpu.resident() == before
    whole = sum(p.nbytes for p in decoding._quick.decoder.parameters())
    assert 0 < gpu.peak - before < whole < sum(gpu.uploads)  # part by part
    assert decoding._quick.device == CPU
    assert torch.equal(decoding.decode(z, 0, GPU, quick=True), rounded)


def test_one_that_moved_on_gets_a_copy_where_it_is(model_folder: Path, gpu: FakeCuda, rounded: torch.Tensor) -> None:
    decoding = Decoding(load(model_folder))
    decoding.decode(latents().to("cuda"), 0, GPU, quick=True)
    decoding.stays = True

    found = decoding.decode(latents().to("cuda"), 0, GPU, quick=True)

    assert torch.equal(found, rounded)
    assert decoding._quick.device.type == "cuda"


def test_on_a_cpu_the_copy_is_made_once_and_only_if_it_is_quicker(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, exact: torch.Tensor
) -> None:
    monkeypatch.setattr(quick_decoder, "multiplies_bfloat16", lambda: True)
    decoding = Decoding(load(model_folder))

    assert torch.equal(decoding.decode(latents(), 0, CPU, quick=False), exact)
    assert decoding._quick is None
    first = decoding.decode(latents(), 0, CPU, quick=True)
    kept = decoding._quick
    assert torch.equal(decoding.decode(latents(), 0, CPU, quick=True), first)
    assert decoding._quick is kept is not None
    assert not torch.equal(first, exact)
    assert torch.equal(decoding.decode(latents(), 0, CPU, quick=False), exact)


REQUEST: dict[str, Any] = {"input_prompt": "a fox", "seed": 3, "sampling_steps": 1, "width": 32, "height": 48}


def draw(model: model_factory, offloader: Any, *, stays: bool) -> torch.Tensor:
    offloader.place({"transformer": model.transformer, "text_encoder": model.text_encoder, "vae": model.vae})
    model.device = offloader.device
    model.prepare(("sdpa",), records=stays)
    pictures = [model.generate(**REQUEST), model.generate(**REQUEST, precision="exact"), model.generate(**REQUEST)]
    offloader.release()
    return torch.stack([picture for picture in pictures if picture is not None])


def test_mmgp_draws_what_weights_that_stay_do_in_both_precisions(model_folder: Path, gpu: FakeCuda) -> None:
    engine = pytest.importorskip("shared.app.mmgp_engine")

    def load_all() -> model_factory:
        return model_factory(
            model_filename=model_folder / "transformer.safetensors", dtype=torch.bfloat16, VAE_dtype=torch.float32
        )

    expected = draw(load_all(), DirectPlacement("cuda"), stays=True)
    found = draw(load_all(), engine.MmgpOffload(PROFILES[4]), stays=False)

    assert torch.equal(found, expected)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])

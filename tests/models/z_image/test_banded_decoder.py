"""A decode in bands of rows: the numbers of the plain decoder, in less memory and no more products."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models.z_image import autoencoder, banded_decoder
from models.z_image.banded_decoder import BandedDecoder
from models.z_image.bench.stages import VAE as PUBLISHED
from shared.app.memory import ModuleSizes, Workload
from shared.app.memory.decoding import decode_bytes
from shared.app.picture_metrics import ssim
from shared.bench.counters import count
from shared.ops import maps
from shared.ops.maps import eager
from tests.support.live_bytes import LiveBytes

CPU = torch.device("cpu")
GPU = torch.device("meta")  # a device that is not RAM, in FakeTensorMode
ROOT = Path(__file__).parents[3]
SMALL = {
    **PUBLISHED, "block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4, "layers_per_block": 1
}  # fmt: skip


def vae_of(**config: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**{**SMALL, **config}).eval().requires_grad_(False)


def latents(height: int = 6, width: int = 10) -> torch.Tensor:
    return torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[1, 4000, 2**30], ids=["two rows", "some rows", "all rows"])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of all heights: of two rows, of some, and with what is left at the end."""
    monkeypatch.setattr(banded_decoder, "AMPLE_PIECE", request.param)
    monkeypatch.setattr(banded_decoder, "SPARING_PIECE", request.param)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("tile", [0, 10, 3])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"block_out_channels": (16, 16, 16, 32)},  # no shortcut in the last stage
        {"block_out_channels": (8, 12, 24, 24), "use_post_quant_conv": True, "mid_block_add_attention": False},
    ],
    ids=["usual", "no shortcut", "odd"],
)
def test_bands_decode_what_the_plain_decoder_does(config: dict[str, Any], tile: int) -> None:
    vae, z = vae_of(**config), latents()
    banded = BandedDecoder(vae, CPU, torch.float32)

    found = autoencoder.decode(vae, z, tile, banded)

    torch.testing.assert_close(found, autoencoder.decode(vae, z), rtol=0, atol=1e-4)


def test_attention_by_matrix_products_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "implementation", lambda _device: SimpleNamespace(**vars(eager)))  # not eager itself
    monkeypatch.setattr(banded_decoder, "_scores", lambda q, k: q.float() @ k.float().t())
    monkeypatch.setattr(banded_decoder, "_SCORES", 4 * 60 * 7)  # seven queries at a time
    vae, z = vae_of(), latents()

    found = autoencoder.decode(vae, z, 0, BandedDecoder(vae, CPU, torch.float32))

    torch.testing.assert_close(found, autoencoder.decode(vae, z), rtol=0, atol=1e-4)


def test_a_gpu_makes_scores_in_float32_of_bfloat16() -> None:
    with FakeTensorMode():
        q, k = (torch.empty(count, 512, dtype=torch.bfloat16, device="cuda") for count in (7, 60))

        scores = banded_decoder._scores(q, k)

    assert (scores.dtype, scores.shape, scores.device.type) == (torch.float32, (7, 60), "cuda")


def test_pictures_of_one_cell_and_one_row_are_decoded() -> None:
    vae = vae_of()
    banded = BandedDecoder(vae, CPU, torch.float32)

    for z in (latents(1, 1), latents(1, 5), latents(5, 1)):
        torch.testing.assert_close(
            autoencoder.decode(vae, z, 64, banded), autoencoder.decode(vae, z), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("tile", [0, 64, 8], ids=["in one piece", "in bands", "in tiles"])
def test_rounded_it_shows_the_same_picture(demo_vae: AutoencoderKL, tile: int) -> None:
    z = torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(2))
    exact = autoencoder.decode(demo_vae, z)

    found = autoencoder.decode(demo_vae, z, tile, BandedDecoder(demo_vae, CPU))

    assert ssim(pixels(found), pixels(exact)) > 0.999
    assert 0 < levels(found, exact) < 0.4


def test_a_drawing_in_flat_colours_is_nearer_to_float32_than_diffusers_in_bfloat16(demo_vae: AutoencoderKL) -> None:
    with Image.open(ROOT / "docs" / "images" / "demo_256x256.png") as image:
        picture = torch.from_numpy(np.asarray(image.convert("RGB"))[:256, :256].copy()).permute(2, 0, 1) / 127.5 - 1
    z = autoencoder.encode(demo_vae, picture[None])
    exact = autoencoder.decode(demo_vae, z)

    found = autoencoder.decode(demo_vae, z, 64, BandedDecoder(demo_vae, CPU))

    # In a flat colour SSIM counts a step of one level: every way of rounding lies below 0.999 there.
    assert ssim(pixels(found), pixels(exact)) > 0.998
    plain = autoencoder.decode(copy.deepcopy(demo_vae).to(torch.bfloat16), z)
    assert levels(found, exact) < 0.8 * levels(plain, exact) < 0.4


def pixels(pictures: torch.Tensor) -> Any:
    return ((pictures[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


def levels(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).abs().mean() * 127.5)


@pytest.fixture(scope="module")
def demo_vae() -> AutoencoderKL:
    return autoencoder.load_vae(ROOT / "models" / "z_image" / "demo" / "vae", torch.float32)


# ------------------------------------------------------- counted, not computed: the published VAE at a picture's size


class Shapes:
    """The operations as Triton's: nothing allocated but the sums and factors. Numbers are not computed."""

    def settle(self, x: torch.Tensor, *, bias: Any, skip: Any, out: Any, groups: int, doubled: bool = False) -> Any:
        return x.new_empty(1, 2, groups, dtype=torch.float32)

    def factors(self, sums: Any, count: int, weight: torch.Tensor, bias: Any, eps: float, before: Any = None) -> Any:
        return torch.empty(2, len(weight), device=weight.device).unbind()

    def normalise(self, x: Any, factor: Any, summand: Any, out: Any, *, silu: bool = True) -> None: ...


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[AutoencoderKL]:
    monkeypatch.setattr(maps, "implementation", lambda _device: Shapes())
    monkeypatch.setattr(banded_decoder, "_scores", lambda q, k: q.new_empty(len(q), len(k), dtype=torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield AutoencoderKL(**PUBLISHED).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("side", "tile", "most"),
    [(512, 512, 0.16e9), (1024, 512, 0.47e9), (1024, 0, 0.97e9), (1536, 512, 0.98e9), (1024, 64, 0.36e9)],
    ids=str,
)
def test_memory_beyond_the_weights_is_as_told(published: AutoencoderKL, side: int, tile: int, most: float) -> None:
    # Tiles are counted where RAM is not, the others where torch lays convolutions out as a GPU does.
    device = GPU if 0 < tile < side // 8 else CPU
    banded = BandedDecoder(published, device)
    z = torch.empty(1, 16, side // 8, side // 8, device=device)

    with LiveBytes(device) as live:
        autoencoder.decode(published, z, tile, banded)

    assert 0.85 * most < live.most <= most


@pytest.mark.parametrize(("side", "tile"), [(512, 64), (1024, 128), (1024, 0), (1024, 64)])
def test_weights_that_rest_in_ram_take_little_more_as_the_plan_predicts(
    published: AutoencoderKL, side: int, tile: int
) -> None:
    banded = BandedDecoder(published, CPU)
    z = torch.empty(1, 16, side // 8, side // 8, device=GPU)
    vae = ModuleSizes(nbytes=sum(weight.nbytes for weight in published.parameters()))
    work = Workload(
        width=side, height=side, tile_cells=tile, compute_bytes=2, vae_bytes=4, guided=False, on_cpu=False,
        decode_bytes=2,
    )  # fmt: skip

    with LiveBytes(GPU) as live:
        autoencoder.decode(published, z, tile, banded)

    assert decode_bytes(work, tile, vae, channels=256) == pytest.approx(live.most, rel=0.1)
    if (side, tile) == (1024, 128):
        assert live.most <= 0.48e9


def test_nobody_waits_for_the_gpu_before_the_picture_is_done(published: AutoencoderKL) -> None:
    banded = BandedDecoder(published, CPU)
    z = banded.prepare(torch.empty(1, 16, 64, 64))

    assert count(lambda: banded.decode(z, sparing=True)).host_reads == 0


def test_it_multiplies_no_more_than_the_decoder_as_it_is_written(published: AutoencoderKL) -> None:
    banded = BandedDecoder(published, CPU)
    z = torch.empty(1, 16, 128, 128)

    def products(work: Any) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return float(counter.get_total_flops())

    # Attention's two products, 2 N^2 C each: none of the plain decoder's is counted, nor the first of ours.
    scores = 2 * (128 * 128) ** 2 * 512
    plain = products(lambda: autoencoder.decode(published, z)) + 2 * scores
    sparing, ample = (products(lambda s=s: banded.decode(banded.prepare(z), sparing=s)) + scores for s in (True, False))

    assert plain == pytest.approx(10.47e12, rel=0.001)
    assert sparing < plain
    assert ample < 0.87 * sparing

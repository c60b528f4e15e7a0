"""A decode in tiles against one piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.z_image import autoencoder


@pytest.mark.parametrize("tile", [3, 8, 16])
@pytest.mark.parametrize("size", [(16, 24), (9, 7)])
def test_tiles_leave_no_seam(model_folder: Path, size: tuple[int, int], tile: int) -> None:
    vae = autoencoder.load_vae(model_folder / "vae", torch.float32)
    latents = torch.randn(1, 16, *size) * 2

    whole = autoencoder.decode(vae, latents)
    tiled = autoencoder.decode(vae, latents, tile)

    # Far below 2/255: the computation is the same in another order.
    assert float((whole - tiled).abs().max()) <= 1e-4


def test_tiles_never_touch_more_than_a_tile_and_its_ring(model_folder: Path) -> None:
    vae = autoencoder.load_vae(model_folder / "vae", torch.float32)
    seen: list[int] = []
    for module in vae.decoder.up_blocks[-1].modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _m, inputs, _o: seen.append(max(inputs[0].shape[-2:])))

    autoencoder.decode(vae, torch.randn(1, 16, 16, 16), tile=4)

    assert max(seen) <= 4 * 8 + 2

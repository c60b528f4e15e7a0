"""The VAE's decoder in bfloat16 against itself in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.upsampling import Upsample2D

from models.z_image import autoencoder, quick_decoder


@pytest.mark.parametrize("tile", [0, 3])
def test_the_quick_decoder_differs_by_less_than_two_levels_of_255(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    monkeypatch.setattr(quick_decoder, "multiplies_bfloat16", lambda: True)
    vae = autoencoder.load_vae(model_folder / "vae", torch.float32)
    latents = torch.randn(1, 16, 6, 4)

    quick = quick_decoder.quick_decoder(vae)
    picture = autoencoder.decode(vae, latents, tile, quick)

    assert quick is not None
    assert {quick.conv_in.weight.dtype, quick.conv_out.weight.dtype} == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    assert 0 < (picture - autoencoder.decode(vae, latents)).abs().mean() * 127.5 < 2


def test_doubling_and_convolving_in_one_is_the_same_sum() -> None:
    upsampler = Upsample2D(5, use_conv=True, out_channels=5)
    x = torch.randn(2, 5, 3, 4)

    with torch.no_grad():
        found, expected = quick_decoder.Doubling(upsampler.conv, upsampler.conv.weight)(x), upsampler(x)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_there_is_no_quick_decoder_where_bfloat16_is_not_multiplied_or_not_asked_for(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick_decoder, "multiplies_bfloat16", lambda: True)
    assert quick_decoder.quick_decoder(autoencoder.load_vae(model_folder / "vae", torch.bfloat16)) is None

    monkeypatch.setattr(quick_decoder, "multiplies_bfloat16", lambda: False)
    assert quick_decoder.quick_decoder(autoencoder.load_vae(model_folder / "vae", torch.float32)) is None

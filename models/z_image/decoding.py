"""How latents become pictures: by the VAE itself, or by a quicker copy of its decoder, and where that lies.

In RAM beside the VAE on a CPU. On a GPU whose weights stay there it takes the place of the VAE's own decoder, which
goes to RAM until somebody asks for it (`exact`). Where weights are moved in and out it rests in RAM too, and visits the
GPU part by part; whoever moves the weights does not see it, and leaves the transformer where it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.z_image import autoencoder
from models.z_image.banded_decoder import BandedDecoder
from models.z_image.quick_decoder import quick_decoder

_CPU = torch.device("cpu")


class Decoding:
    """The VAE's decoder and its quick copy, made when it is first wanted.

    stays: whether the modules are on the device at all times; set by whoever places them.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.stays = False
        self._quick: Any = None

    def decode(self, latents: Tensor, tile: int, device: torch.device, *, quick: bool) -> Tensor:
        """Latents (B, 16, h, w) on `device` to pictures (B, 3, 8h, 8w) in RAM, one at a time.

        tile: see autoencoder.decode(). quick: in bfloat16 where that is quicker.
        """
        decoder = self._prepare(device, quick)
        return torch.cat([autoencoder.decode(self.vae, z[None], tile, decoder).cpu() for z in latents])

    def _prepare(self, device: torch.device, quick: bool) -> Any:
        """What autoencoder.decode() takes besides the VAE, which is put in its place."""
        if device.type == "cpu":
            if quick:
                self._quick = self._quick or quick_decoder(self.vae)
            return self._quick if quick else None
        if device.type != "cuda":
            return None
        if not quick:
            if self.stays:
                self._quick = None
                self._move_own(device)
            return None
        home = device if self.stays else _CPU
        if self._quick is None or self._quick.device.type != home.type:
            self._quick = BandedDecoder(self.vae, home)
        if self.stays:
            self._move_own(_CPU)
        return self._quick

    def _move_own(self, device: torch.device) -> None:
        """The VAE's own decoder to `device`, if it is elsewhere."""
        if self.vae.decoder.conv_in.weight.device.type != device.type:
            self.vae.decoder.to(device)

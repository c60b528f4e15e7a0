"""The demo's latents: a fixed linear code of 8x8 pixel patches, which the autoencoder learns to write and to read.

A learnt encoder puts colours and edges into its channels as it pleases, and a small transformer then has to learn
that language before it can say anything. Here the 16 channels are the 16 strongest principal components of the
drawings' patches: three plain colours with most of the variance, then slopes, then corners. Each is divided by the
root of its deviation, so that colours stand well above the noise (deviation 2.4 to 1.7) and details do not drown
(0.6 to 0.3): coarse to fine, as a sampler works. The code alone restores drawings at 35 dB; the decoder of
`train_vae` does better because it sees neighbours.

`patch_code.npz` is part of the repository: principal components of nearly equal strength may come out turned on
another machine, and latents would not fit the weights.

    python -m training.patch_code
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.scenes import draw_scene, sample_scene

CODE_FILE = Path(__file__).with_name("patch_code.npz")
_SIDE = 8  # pixels
_CHANNELS = 16


@dataclass(frozen=True)
class PatchCode:
    """mean (192,) of a patch, its pixels row by row and RGB last; components (192, 16), unit length; gains (16,)."""

    mean: Tensor
    components: Tensor
    gains: Tensor

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> latents (B, 16, H / 8, W / 8), mean 0, overall deviation 1."""
        coded = (_to_patches(pixels) - self.mean) @ self.components * self.gains
        return coded.permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """The nearest pixels that the code can express; each patch for itself."""
        patches = latents.permute(0, 2, 3, 1) / self.gains @ self.components.T + self.mean
        batch, rows, columns, _ = patches.shape
        pixels = patches.view(batch, rows, columns, _SIDE, _SIDE, 3).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(batch, 3, rows * _SIDE, columns * _SIDE)


def load_patch_code(path: Path = CODE_FILE) -> PatchCode:
    """Read the code that `main` wrote."""
    with np.load(path) as saved:
        return PatchCode(*(torch.from_numpy(saved[name]).float() for name in ("mean", "components", "gains")))


def fit_patch_code(pictures: NDArray[np.uint8]) -> PatchCode:
    """Principal components of (count, H, W, 3) drawings."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 127.5 - 1
    patches = _to_patches(pixels).reshape(-1, 3 * _SIDE * _SIDE)
    mean = patches.mean(0)
    variances, components = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    deviations = variances.flip(0)[:_CHANNELS].sqrt()
    gains = deviations.rsqrt()
    gains = gains / (deviations * gains).square().mean().sqrt()
    return PatchCode(mean.float(), components.flip(1)[:, :_CHANNELS].float(), gains.float())


def _to_patches(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H / 8, W / 8, 192)."""
    batch, _, height, width = pixels.shape
    rows, columns = height // _SIDE, width // _SIDE
    cut = pixels.reshape(batch, 3, rows, _SIDE, columns, _SIDE).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, rows, columns, 3 * _SIDE * _SIDE)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--output", type=Path, default=CODE_FILE)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    scenes = [sample_scene(rng, held_out=False) for _ in range(arguments.pictures)]
    code = fit_patch_code(np.stack([draw_scene(scene, 256, 256) for scene in scenes]))
    np.savez(arguments.output, **{name: getattr(code, name).numpy() for name in ("mean", "components", "gains")})


if __name__ == "__main__":
    main()

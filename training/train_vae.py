"""Train the demo's autoencoder: diffusers' AutoencoderKL, 16 latent channels, 8 pixels per latent cell.

What the latents are is decided by `patch_code.py`; the encoder learns to write that code and the decoder to read it,
side by side and independently, so that latents for the flow model exist before either is trained. Noise of a random
strength is added to the decoder's latents: it then forgives the small errors of a sampler. Crops alternate with whole
pictures of every aspect ratio, as a group norm sees both when decoding in one piece and in tiles.

The decoder's loss: squared error of the colours, then, blended in over the first steps, absolute error of the colours
and of their differences to the right and lower neighbour (edges). Starting with the absolute terms gets stuck at the
mean colour, and so does a higher rate. Seeded; an interrupted run goes on from its checkpoint.

    python -m training.train_vae --steps 2500
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from training.checkpoints import load_checkpoint, save_checkpoint
from training.patch_code import PatchCode, load_patch_code
from training.scenes import draw_scene, sample_scene

LATENT_CHANNELS = 16
SCALING_FACTOR = 0.3611  # the official autoencoder's constants, so that every code path sees the same numbers
SHIFT_FACTOR = 0.1159
VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 48, 64),
    "layers_per_block": 1,
    "norm_num_groups": 2,  # groups of two channels could not even express a plain colour
    "sample_size": 256,
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
    "scaling_factor": SCALING_FACTOR,
    "shift_factor": SHIFT_FACTOR,
}
PICTURE_SIZES = ((256, 256), (384, 256), (256, 384))  # (width, height)

_EDGE_WEIGHT = 0.7
_EDGE_EMPHASIS = 2.0  # how much more an error near an edge counts: tips of small stars are few pixels
_JUMP = 0.1  # of the range of 2
_LARGEST_NOISE = 0.12  # deviation of the noise on the latents, whose own deviation is 1
_P_WHOLE = 0.25
_WARM_UP_STEPS = 50


class AutoencoderInTraining(nn.Module):
    """An AutoencoderKL; outside it, latents are the patch code with mean 0 and deviation 1."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = AutoencoderKL(**VAE_CONFIG)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> latents (B, 16, H/8, W/8)."""
        mode = self.vae.encoder(pixels)[:, :LATENT_CHANNELS]
        latents: Tensor = (mode.float() - SHIFT_FACTOR) * SCALING_FACTOR
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Inverse of `encode`; returns pixels in about [-1, 1]."""
        pixels: Tensor = self.vae.decoder(latents / SCALING_FACTOR + SHIFT_FACTOR)
        return pixels


def draw_pool(
    count: int, sizes: tuple[tuple[int, int], ...], seed: int, small_share: float = 0.0
) -> list[NDArray[np.uint8]]:
    """Draw `count` random training scenes, cycling through the sizes; `small_share` of them with small shapes only."""
    rng = np.random.default_rng(seed)
    pictures = []
    for i in range(count):
        scene = sample_scene(rng, held_out=False)
        if rng.random() < small_share:
            scene = replace(scene, shapes=tuple(replace(shape, size="small") for shape in scene.shapes))
        pictures.append(draw_scene(scene, *sizes[i % len(sizes)]))
    return pictures


def to_pixels(pictures: list[NDArray[np.uint8]]) -> Tensor:
    """List of (H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], channels last in memory."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def reconstruction_loss(decoded: Tensor, pixels: Tensor, sharpness: float = 1.0) -> Tensor:
    """Squared error plus, times `sharpness` in [0, 1], absolute errors of colours and of neighbour differences."""
    near_edges = 1 + _EDGE_EMPHASIS * edge_mask(pixels)
    error = (decoded.float() - pixels) * near_edges
    across = error[..., :, 1:] - error[..., :, :-1]
    down = error[..., 1:, :] - error[..., :-1, :]
    absolute = error.abs().mean() + _EDGE_WEIGHT * (across.abs().mean() + down.abs().mean())
    return error.square().mean() + sharpness * absolute


def edge_mask(pixels: Tensor) -> Tensor:
    """(B, 1, H, W): 1 within three pixels of a place where the picture (B, 3, H, W) jumps, else 0."""
    jump = torch.zeros_like(pixels[:, :1])
    jump[..., :, 1:] += (pixels[..., :, 1:] - pixels[..., :, :-1]).abs().amax(1, keepdim=True)
    jump[..., 1:, :] += (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().amax(1, keepdim=True)
    return F.max_pool2d((jump > _JUMP).float(), 7, stride=1, padding=3)


def random_crops(pool: list[NDArray[np.uint8]], batch: int, side: int, rng: np.random.Generator) -> Tensor:
    """Square crops; of two candidates the one with more contrast is kept, since most of a picture is plain ground."""
    crops = []
    for _ in range(batch):
        picture = pool[rng.integers(len(pool))]
        candidates = []
        for _ in range(2):
            top, left = rng.integers(picture.shape[0] - side + 1), rng.integers(picture.shape[1] - side + 1)
            candidates.append(picture[top : top + side, left : left + side])
        crops.append(max(candidates, key=lambda crop: float(crop[::4, ::4].std(axis=(0, 1)).sum())))
    return to_pixels(crops)


def random_batch(pools: dict[tuple[int, int], list[NDArray[np.uint8]]], rng: np.random.Generator) -> Tensor:
    """Pixels of one step: crops three times out of four, else whole pictures of one size."""
    sizes = list(pools)
    if rng.random() < _P_WHOLE:
        pool = pools[sizes[rng.integers(len(sizes))]]
        return to_pixels([pool[i] for i in rng.integers(len(pool), size=2)])
    side, batch = ((64, 16), (96, 7), (128, 4))[rng.integers(3)]
    return random_crops(pools[sizes[0]], batch, side, rng)


def losses(
    model: AutoencoderInTraining,
    code: PatchCode,
    pixels: Tensor,
    rng: np.random.Generator,
    *,
    gentle: float,
    encoder: bool,
) -> tuple[Tensor, Tensor]:
    """The encoder's squared error against the code (0 unless `encoder`), and the decoder's reconstruction loss.

    gentle: how far noise and absolute terms are blended in, 0 to 1.
    """
    latents = code.encode(pixels)
    written = (model.encode(pixels) - latents).square().mean() if encoder else torch.zeros(())
    strength = gentle * torch.from_numpy(rng.random((len(pixels), 1, 1, 1), np.float32)) * _LARGEST_NOISE
    noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
    read = model.decode(latents + strength * noise)
    return written, reconstruction_loss(read, pixels, sharpness=0.05 + 0.95 * gentle)


@torch.no_grad()
def measure(
    model: AutoencoderInTraining, code: PatchCode, *, count: int = 12, seed: int = 999
) -> tuple[float, float, float]:
    """PSNR in dB on unseen pictures: from the code, from the code with noise of 0.1, from the own encoder's latents."""
    pixels = to_pixels(draw_pool(count, ((256, 256),), seed))
    latents = code.encode(pixels)
    noisy = latents + 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    ratios = []
    for z in (latents, noisy, model.encode(pixels)):
        error = (model.decode(z).clamp(-1, 1) - pixels).square().mean()
        ratios.append(10 * math.log10(4 / float(error)))
    return ratios[0], ratios[1], ratios[2]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    warm = min(1.0, (step + 1) / _WARM_UP_STEPS)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def train(arguments: argparse.Namespace) -> None:
    """Train from the checkpoint, or from the start."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    code = load_patch_code()
    model = AutoencoderInTraining().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    first_step = 0
    if arguments.start_from is not None:
        model.load_state_dict(load_checkpoint(arguments.start_from)["model"])
    if arguments.checkpoint.exists():
        saved = load_checkpoint(arguments.checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first_step = saved["step"]

    pools = {
        size: draw_pool(arguments.pictures // len(PICTURE_SIZES), (size,), arguments.seed, arguments.small_share)
        for size in PICTURE_SIZES
    }
    started, running = time.monotonic(), np.zeros(2)
    for step in range(first_step, arguments.steps):
        rng = np.random.default_rng((arguments.seed, step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.peak_rate)
        pixels = random_batch(pools, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            gentle = min(1.0, (step + 1) / max(arguments.blend_steps, 1))
            written, read = losses(model, code, pixels, rng, gentle=gentle, encoder=not arguments.decoder_only)
        optimizer.zero_grad(set_to_none=True)
        (written + read).backward()
        for part in (model.vae.decoder,) if arguments.decoder_only else (model.vae.encoder, model.vae.decoder):
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        values = np.array([float(written.detach()), float(read.detach())])
        running = values if step == first_step else 0.98 * running + 0.02 * values
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - started) / (step + 1 - first_step)
            print(f"step {step + 1} encoder {running[0]:.4f} decoder {running[1]:.4f} {seconds:.3f} s/step", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == arguments.steps:
            clean, noisy, whole = measure(model, code)
            print(f"step {step + 1} PSNR {clean:.2f} dB, noisy {noisy:.2f} dB, both ways {whole:.2f} dB", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(arguments.checkpoint, {**state, "step": step + 1})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--start-from", type=Path, help="weights to begin with instead of random ones")
    parser.add_argument("--blend-steps", type=int, default=600, help="until noise and absolute terms count fully")
    parser.add_argument("--peak-rate", type=float, default=5e-4, help="learning rate; 3e-4 and less to polish")
    parser.add_argument("--decoder-only", action="store_true", help="leave the encoder as it is")
    parser.add_argument("--small-share", type=float, default=0.0, help="of the drawings, those with small shapes only")
    parser.add_argument("--pictures", type=int, default=1500, help="size of the pool of drawings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--checkpoint", type=Path, default=Path("work/vae.pt"))
    train(parser.parse_args())


if __name__ == "__main__":
    main()

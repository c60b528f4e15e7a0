"""Train the demo's autoencoder: diffusers' AutoencoderKL, 16 latent channels, 8 pixels per latent cell.

Two phases, both seeded and resumable (`--checkpoint` holds weights, optimizer and step):

1. `--phase joint`: encoder and decoder on crops of drawn scenes. Between them sits a batch norm without
   weights, which gives every latent channel mean 0 and deviation 1; noise of a random strength is added
   there, so that the decoder forgives the small errors of a sampler. The norm is folded into the encoder's
   last convolution when exported, and the decoder always sees `z / SCALING_FACTOR + SHIFT_FACTOR`: the file
   then uses the same two constants as the official autoencoder.
2. `--phase decoder`: encoder frozen (latents stay valid for a flow model trained meanwhile), decoder
   polished on whole pictures of every aspect ratio, decoded as a whole and as tiles.

Loss: squared error of the colours, then, blended in over the first steps, absolute error of the colours and
of their differences to the right and lower neighbour (edges). Starting with the absolute terms gets stuck
at the mean colour, and so does a higher rate.

    python -m training.train_vae --phase joint --steps 4000
    python -m training.train_vae --phase decoder --steps 600
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from training.checkpoints import load_checkpoint, save_checkpoint
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
_LARGEST_NOISE = 0.25  # deviation of the noise on the latents, whose own deviation is 1
_PEAK_RATE = {"joint": 5e-4, "decoder": 4e-4}
_WARM_UP_STEPS = 50
_BLEND_STEPS = 600


class AutoencoderInTraining(nn.Module):
    """Encoder, batch norm, decoder; `normalised` latents have mean 0 and deviation 1 per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = AutoencoderKL(**VAE_CONFIG)
        self.norm = nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.02)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> normalised latents (B, 16, H/8, W/8)."""
        mean_channels = self.vae.encoder(pixels)[:, :LATENT_CHANNELS]
        normalised: Tensor = self.norm(mean_channels.float())
        return normalised

    def decode(self, normalised: Tensor) -> Tensor:
        """Inverse of `encode`; returns pixels in about [-1, 1]."""
        pixels: Tensor = self.vae.decoder(normalised / SCALING_FACTOR + SHIFT_FACTOR)
        return pixels


def draw_pool(count: int, sizes: tuple[tuple[int, int], ...], seed: int) -> list[NDArray[np.uint8]]:
    """Draw `count` random training scenes, cycling through the sizes."""
    rng = np.random.default_rng(seed)
    return [draw_scene(sample_scene(rng, held_out=False), *sizes[i % len(sizes)], rng) for i in range(count)]


def to_pixels(pictures: list[NDArray[np.uint8]]) -> Tensor:
    """List of (H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], channels last in memory."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def reconstruction_loss(decoded: Tensor, pixels: Tensor, sharpness: float = 1.0) -> Tensor:
    """Squared error plus, times `sharpness` in [0, 1], absolute errors of colours and of neighbour differences."""
    error = decoded.float() - pixels
    across = error[..., :, 1:] - error[..., :, :-1]
    down = error[..., 1:, :] - error[..., :-1, :]
    absolute = error.abs().mean() + _EDGE_WEIGHT * (across.abs().mean() + down.abs().mean())
    return error.square().mean() + sharpness * absolute


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


def joint_step(
    model: AutoencoderInTraining, pool: list[NDArray[np.uint8]], rng: np.random.Generator, step: int
) -> Tensor:
    """One batch of crops through encoder and decoder; returns the loss."""
    side, batch = ((64, 16), (64, 16), (96, 7), (128, 4))[rng.integers(4)]
    pixels = random_crops(pool, batch, side, rng)
    latents = model.encode(pixels)
    gentle = min(1.0, step / _BLEND_STEPS)
    strength = gentle * torch.rand(batch, 1, 1, 1) * _LARGEST_NOISE
    decoded = model.decode(latents + strength * torch.randn_like(latents))
    return reconstruction_loss(decoded, pixels, sharpness=0.05 + 0.95 * gentle)


def decoder_step(
    model: AutoencoderInTraining, pool: list[NDArray[np.uint8]], rng: np.random.Generator, step: int
) -> Tensor:
    """One whole picture, or tiles of its latents, through the decoder alone; returns the loss."""
    shape = pool[rng.integers(len(pool))].shape
    same_size = [p for p in pool if p.shape == shape]
    pixels = to_pixels([same_size[i] for i in rng.integers(len(same_size), size=2)])
    with torch.no_grad():
        latents = model.encode(pixels)
    if rng.random() < 0.4:  # a tile: its surroundings, and so the statistics of the group norms, are missing
        cells = int(rng.integers(16, 29))
        top, left = (int(rng.integers(max(n - cells, 0) + 1)) for n in latents.shape[-2:])
        latents = latents[..., top : top + cells, left : left + cells]
        pixels = pixels[..., top * 8 : (top + cells) * 8, left * 8 : (left + cells) * 8]
    strength = torch.rand(len(latents), 1, 1, 1) * _LARGEST_NOISE
    return reconstruction_loss(model.decode(latents + strength * torch.randn_like(latents)), pixels)


@torch.no_grad()
def measure(model: AutoencoderInTraining, *, count: int = 12, seed: int = 999) -> tuple[float, float]:
    """Peak signal-to-noise ratios in dB on unseen pictures: from clean latents, and with noise of deviation 0.1."""
    was_training = model.training
    model.eval()
    pixels = to_pixels(draw_pool(count, ((256, 256),), seed))
    latents = model.encode(pixels)
    noisy = latents + 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    ratios = []
    for z in (latents, noisy):
        error = (model.decode(z).clamp(-1, 1) - pixels).square().mean()
        ratios.append(10 * math.log10(4 / float(error)))
    model.train(was_training)
    return ratios[0], ratios[1]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    warm = min(1.0, (step + 1) / _WARM_UP_STEPS)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def train(arguments: argparse.Namespace) -> None:
    """Run one phase from its checkpoint, or from the start."""
    torch.manual_seed(arguments.seed)
    model = AutoencoderInTraining().to(memory_format=torch.channels_last)
    first_step = 0
    saved = load_checkpoint(arguments.checkpoint) if arguments.checkpoint.exists() else None
    if saved is not None:
        model.load_state_dict(saved["model"])
        first_step = saved["step"] if saved["phase"] == arguments.phase else 0
    elif arguments.phase == "decoder":
        raise SystemExit(f"{arguments.checkpoint} does not exist: run --phase joint first")
    if arguments.phase == "decoder":
        model.vae.encoder.requires_grad_(False)
        model.norm.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    if saved is not None and first_step > 0:
        optimizer.load_state_dict(saved["optimizer"])

    sizes = ((256, 256),) if arguments.phase == "joint" else PICTURE_SIZES
    pool = draw_pool(arguments.pictures, sizes, arguments.seed)
    make_loss = joint_step if arguments.phase == "joint" else decoder_step
    started, running = time.monotonic(), 0.0
    for step in range(first_step, arguments.steps):
        rng = np.random.default_rng((arguments.seed, step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, _PEAK_RATE[arguments.phase])
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            loss = make_loss(model, pool, rng, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        running = float(loss.detach()) if step == first_step else 0.98 * running + 0.02 * float(loss.detach())
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - started) / (step + 1 - first_step)
            print(f"step {step + 1} loss {running:.4f} {seconds:.3f} s/step", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == arguments.steps:
            clean, noisy = measure(model)
            model.norm.train(arguments.phase == "joint")
            print(f"step {step + 1} PSNR {clean:.2f} dB, with noise {noisy:.2f} dB", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(arguments.checkpoint, {**state, "phase": arguments.phase, "step": step + 1})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=("joint", "decoder"), default="joint")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--pictures", type=int, default=2000, help="size of the pool of drawings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--checkpoint", type=Path, default=Path("work/vae.pt"))
    train(parser.parse_args())


if __name__ == "__main__":
    main()

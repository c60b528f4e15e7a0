"""Captions to pictures with the parts at hand: what the quick look during training and the judge share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.z_image.transformer import ZImageTransformer
from shared.samplers import flow_euler

EncodeText = Callable[[Sequence[str]], list[Tensor]]  # prompts -> features (tokens, width) each
Decode = Callable[[Tensor], Tensor]  # normalised latents -> pixels (B, 3, H, W) in [-1, 1]


@torch.no_grad()
def sample_pictures(
    transformer: ZImageTransformer,
    encode_text: EncodeText,
    decode: Decode,
    prompts: Sequence[str],
    *,
    width: int,
    height: int,
    first_seed: int = 0,
    steps: int = 8,
    shift: float = 3.0,
) -> list[NDArray[np.uint8]]:
    """One picture (height, width, 3) uint8 for each prompt, without guidance.

    Prompt i starts from the noise of seed first_seed + i.
    """
    captions = transformer.encode_captions(encode_text(prompts))
    shape = (16, height // 8, width // 8)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(first_seed + i)) for i in range(len(prompts))]

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        time = torch.full((len(latents),), 1 - sigma)
        return -transformer(latents, time, captions)

    *_, latents = flow_euler.sample(velocity, torch.stack(noise), flow_euler.schedule(steps, shift))
    pixels = decode(latents).float().clamp(-1, 1)
    pictures = ((pixels + 1) * 127.5 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return list(pictures)

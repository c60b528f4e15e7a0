"""What may bend a generation besides its prompts: a picture to start from, and a control branch's signal.

The denoising loop knows these protocols and nothing of what stands behind them. Both are values that a GenerateRequest
holds; what they need of the model (the VAE's encoder) is handed to them when the generation begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from models.z_image.control import ControlSignal

    # Pictures (B, 3, H, W) in [-1, 1] -> latents (B, 16, H/8, W/8) float32 on the pipeline's device.
    Encode = Callable[[Tensor], Tensor]
    # (latents, velocity, sigma) -> velocity
    Constrain = Callable[[Tensor, Tensor, float], Tensor]
    # share of the steps that are done, 0 to 1 -> the signal of the next forward, None while there is none
    Signals = Callable[[float], ControlSignal | None]


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where the walk starts and what it may not leave.

    sigmas: the part of the schedule that is run, falling to 0. latents: (B, 16, h, w) float32 at sigmas[0].
    constrain: changes each velocity before the sampler sees it. To keep a region as it is in known latents z, give the
    velocity (latents - z) / sigma there: every sampler, with or without memory or fresh noise, then ends on z exactly.
    """

    sigmas: Sequence[float]
    latents: Tensor
    constrain: Constrain | None = None


class Start(Protocol):
    """A picture to start from: image to image, inpainting, outpainting, a second pass."""

    def begin(self, noise: Tensor, sigmas: Sequence[float], encode: Encode) -> Beginning:
        """Choose the part of `sigmas` to run and mix the start from the picture and `noise` (B, 16, h, w) float32."""

    def finish(self, pictures: Tensor) -> Tensor:
        """Decoded pictures (B, 3, H, W) in [-1, 1] on the CPU -> what is returned: put back what was to be kept."""


class Control(Protocol):
    """A control picture and when it counts."""

    def begin(self, encode: Encode) -> Signals:
        """Encode the picture; the result is asked for the signal of each forward."""

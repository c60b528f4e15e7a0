"""One drawing that the model is asked for, and pictures as it takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass:
    """One drawing the model is asked for. start, control: RGB at its size; mask: "L", 0 or 255, at its size.
    references: RGB of any size.

    strength: share of the steps, for `start`. window: shares of the steps in which control counts.
    seed: added to the picture's seed, so that tiles differ.
    """

    width: int
    height: int
    start: Image.Image | None = None
    mask: Image.Image | None = None
    control: Image.Image | None = None
    references: tuple[Image.Image, ...] = ()
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def host_kwargs(self) -> dict[str, Any]:
        """As keywords of a pipeline object's `generate` (contract C1d): tensors in [-1, 1], the mask in {0, 1}."""
        keywords: dict[str, Any] = {
            "width": self.width,
            "height": self.height,
            "denoising_strength": self.strength,
        }
        if self.start is not None:
            keywords["image_start"] = _to_tensor(self.start)
        if self.mask is not None:
            keywords["input_masks"] = (_to_tensor(self.mask) > 0).float()
        if self.control is not None:
            keywords["input_frames"] = _to_tensor(self.control)[:, None]
        if self.references:
            keywords["input_ref_images"] = list(self.references)
        if self.window != (0, 1):
            keywords["control_start"], keywords["control_end"] = self.window
        return keywords


Draw = Callable[[Pass], "Image.Image"]


def _to_tensor(image: Image.Image) -> Any:
    """(channels, H, W) float32 in [-1, 1]; levels of 8 bits come back exactly."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(image))
    pixels = pixels[:, :, None] if pixels.dim() == 2 else pixels
    return pixels.permute(2, 0, 1).float() / 127.5 - 1

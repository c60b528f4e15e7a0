"""Drawing from pictures: image to image, inpainting, and control pictures, as the pipeline's conditions.

Image to image starts at a lower sigma from a mix of the picture's latents and noise. Inpainting with the plain model
does the same and keeps the rest: there the velocity points at the picture's own latents, so that every sampler walks
the known region back to them. With a control branch that has channels for it (2.x), the branch tells the network what
stands around the mask instead, and drawing is free. Either way what lies outside the mask is put back, bit for bit.

Masks here are (1, H, W) in {0, 1} on the picture's pixels: 1 is repainted. Pictures are (3, H, W) in [-1, 1].
Sources: diffusers 0.42.1 ZImageImg2ImgPipeline, ZImageInpaintPipeline (same starts, same blending);
VideoX-Fun pipeline_z_image_control.py and Wan2GP pipeline_z_image.py for the control context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.z_image.conditions import Beginning
from models.z_image.control import ControlSignal
from models.z_image.control_config import ControlConfig
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from models.z_image.conditions import Encode, Signals

LATENT_CHANNELS = 16
CELL = 8  # pixels along a latent cell
DEFAULT_WEIGHT = 0.75  # Wan2GP's handler


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PictureStart:
    """Start from a picture. strength: share of the steps that are run; 1 begins at pure noise.

    mask: what to repaint; None is all of it. free: let the drawing run through, a control branch knows the rest.
    """

    picture: Tensor
    strength: float = 1.0
    mask: Tensor | None = None
    free: bool = False

    def begin(self, noise: Tensor, sigmas: Sequence[float], encode: Encode) -> Beginning:
        """See conditions.Start. Raises UserError when the strength leaves no step to run."""
        part = part_to_run(sigmas, self.strength)
        if part[0] == 1 and (self.mask is None or self.free):
            return Beginning(part, noise)  # nothing of the picture shows, so it need not be encoded
        known = encode(self.picture[None])
        latents = part[0] * noise + (1 - part[0]) * known
        if self.mask is None or self.free:
            return Beginning(part, latents)
        repaint = cells_to_repaint(self.mask).to(known.device)

        def constrain(latents: Tensor, velocity: Tensor, sigma: float) -> Tensor:
            if sigma == 0:  # asked beyond the last step: nothing is left to keep
                return velocity
            return torch.where(repaint, velocity, (latents - known) / sigma)

        return Beginning(part, latents, constrain)

    def finish(self, pictures: Tensor) -> Tensor:
        """Put the pixels outside the mask back."""
        if self.mask is None:
            return pictures
        return torch.where(self.mask.bool(), pictures, self.picture.to(pictures))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ControlPicture:
    """What a control branch is shown, and when: from `start` to `end`, shares of the steps.

    picture: the control picture (edges, depth ...); None shows none. repaint, mask: the picture to inpaint and where,
    for branches with channels for it.
    """

    channels: int
    picture: Tensor | None = None
    weight: float = DEFAULT_WEIGHT
    start: float = 0.0
    end: float = 1.0
    repaint: Tensor | None = None
    mask: Tensor | None = None

    def begin(self, encode: Encode) -> Signals:
        """See conditions.Control."""
        signal = ControlSignal(self.context(encode), self.weight)

        def signals(progress: float) -> ControlSignal | None:
            return signal if self.start <= progress and (progress < self.end or self.end == 1) else None

        return signals

    def context(self, encode: Encode) -> Tensor:
        """(1, channels, h, w): control latents, and in 2.x the keep mask and the latents of what is kept.

        Without inpainting the last 17 channels are 0. What is to be repainted is middle grey in the encoded picture.
        """
        shown = None if self.picture is None else encode(self.picture[None])
        if self.channels == LATENT_CHANNELS:
            assert shown is not None  # conditions_from_host() makes none without a control picture
            return shown
        if self.mask is None or self.repaint is None:
            assert shown is not None
            return torch.cat([shown, shown.new_zeros(1, self.channels - LATENT_CHANNELS, *shown.shape[2:])], dim=1)
        kept = encode((self.repaint * (1 - self.mask))[None])
        keep = 1 - F.interpolate(self.mask[None].to(kept), size=kept.shape[-2:], mode="nearest")
        return torch.cat([torch.zeros_like(kept) if shown is None else shown, keep, kept], dim=1)


def part_to_run(sigmas: Sequence[float], strength: float) -> list[float]:
    """The end of a schedule that `strength` of its steps runs, rounded up as diffusers does.

    Raises UserError when that is no step at all.
    """
    steps = len(sigmas) - 1
    skipped = int(max(steps - min(steps * strength, steps), 0))
    if skipped >= steps:
        raise UserError(
            f"A denoising strength of {strength:g} leaves none of the {steps} steps to draw.", "Choose a larger one."
        )
    return list(sigmas[skipped:])


def cells_to_repaint(mask: Tensor) -> Tensor:
    """(1, 1, h, w) bool: the latent cells in which any pixel is to be repainted."""
    return F.max_pool2d(mask[None].float(), CELL) > 0


def conditions_from_host(
    kwargs: Mapping[str, Any], branch: ControlConfig | None, *, width: int, height: int
) -> tuple[PictureStart | None, ControlPicture | None]:
    """The start and the control that generate()'s keywords ask for (wan2gp-contract C1d).

    input_frames: the control picture, or with `input_masks` and no `image_start` the picture to repaint, which the
    branch is then shown as control picture too, as Wan2GP does. image_start: the picture to start from; with
    `input_masks` the one to repaint. denoising_strength: for image_start. context_scale: [weight].
    control_start, control_end: our own, shares of the steps.
    Raises UserError for a control picture without a branch, a mask without a picture, a picture of another size.
    """
    if kwargs.get("input_frames") is not None and branch is None:
        raise UserError(
            "This model has no control branch, so a control picture cannot steer it.",
            "Choose a preset with a ControlNet, or leave the control picture out.",
        )
    size = (height, width)
    shown = _picture(kwargs.get("input_frames"), size, "control picture")
    start = _picture(kwargs.get("image_start"), size, "start picture")
    mask = _mask(kwargs.get("input_masks"), size)
    repaint = start if start is not None else shown
    if mask is not None and repaint is None:
        raise UserError("There is a mask but no picture to repaint.", "Give the picture, or leave the mask out.")
    inpaints = mask is not None and branch is not None and branch.can_inpaint
    control = None
    if branch is not None and (shown is not None or inpaints):
        scales = kwargs.get("context_scale") or [DEFAULT_WEIGHT]
        first, last = _window(kwargs)
        control = ControlPicture(
            channels=branch.in_channels, picture=shown, weight=float(scales[0]), start=first, end=last,
            repaint=repaint if inpaints else None, mask=mask if inpaints else None,
        )  # fmt: skip
    if start is None and mask is None:
        return None, control
    assert repaint is not None
    given = kwargs.get("denoising_strength")
    strength = 1.0 if given is None or start is None else float(given)
    return PictureStart(picture=repaint, strength=strength, mask=mask, free=inpaints), control


def _picture(value: Any, size: tuple[int, int], what: str) -> Tensor | None:
    """(3, H, W) from a host's (3, H, W) or (3, 1, H, W)."""
    if value is None:
        return None
    picture: Tensor = value[:, 0] if value.dim() == 4 else value
    if picture.shape != (3, *size):
        height, width = size
        raise UserError(
            f"The {what} is {list(picture.shape)} (channels, height, width), the drawing {width}x{height}.",
            "It must be fitted to the drawing's size first.",
        )
    return picture.float().cpu()


def _mask(value: Any, size: tuple[int, int]) -> Tensor | None:
    """(1, H, W) in {0, 1} from a host's mask, which may have three channels or a frame axis."""
    if value is None:
        return None
    mask: Tensor = value[:1, 0] if value.dim() == 4 else value[:1]
    if mask.shape != (1, *size):
        height, width = size
        raise UserError(
            f"The mask is {list(mask.shape)} (channels, height, width), the drawing {width}x{height}.",
            "It must be fitted to the drawing's size first.",
        )
    return (mask.float() > 0.5).float().cpu()


def _window(kwargs: Mapping[str, Any]) -> tuple[float, float]:
    first = float(kwargs.get("control_start") or 0.0)
    given = kwargs.get("control_end")
    last = 1.0 if given is None else float(given)
    if not 0 <= first < last <= 1:
        raise UserError(
            f"Control from {first:g} to {last:g} of the steps is no window.", "Both are shares, 0 to 1, in this order."
        )
    return first, last

"""One generation as the pipeline needs it, and the only place that knows what hosts call its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.z_image.conditions import Control, Start
from models.z_image.guidance import ClassifierFreeGuidance
from shared.quant.errors import UserError

# Pictures are 8x the latents, patches 2x2 latents.
SIZE_MULTIPLE = 16
# Tongyi-MAI/Z-Image src/config/model.py: Turbo's scheduler.
DEFAULT_SHIFT = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Everything that decides a picture. Image i of the batch starts from noise drawn with seeds[i]."""

    prompt: str
    negative_prompt: str = ""
    width: int = 1024  # pixels, a multiple of 16
    height: int = 1024
    steps: int = 8  # calls of the network per picture, twice as many with guidance
    seeds: tuple[int, ...] = (0,)
    sampler: str = ""
    shift: float = DEFAULT_SHIFT
    guidance: ClassifierFreeGuidance = field(default_factory=ClassifierFreeGuidance)
    start: Start | None = None  # a picture to start from; None starts from noise alone
    control: Control | None = None  # a control picture; None draws without
    tile: int = 0  # side of a decoding tile in latent cells, 0 in one piece

    def __post_init__(self) -> None:
        for name, pixels in (("width", self.width), ("height", self.height)):
            if pixels < SIZE_MULTIPLE or pixels % SIZE_MULTIPLE:
                below = max(pixels // SIZE_MULTIPLE, 1) * SIZE_MULTIPLE
                raise UserError(
                    f"The {name} {pixels} is not a multiple of {SIZE_MULTIPLE} pixels.",
                    f"The nearest are {below} and {below + SIZE_MULTIPLE}.",
                )
        if self.steps < 1:
            raise UserError(f"{self.steps} steps cannot draw a picture.", "Use at least 1; Turbo is made for 8.")
        if self.shift <= 0:
            raise UserError(f"The flow shift {self.shift} is not above 0.", "Turbo uses 3, Base 6.")


def from_host_kwargs(model_def: Mapping[str, Any], kwargs: Mapping[str, Any]) -> GenerateRequest:
    """Translate generate()'s keywords (wan2gp-contract C1d) into a request.

    Keywords not named here are ignored on purpose: a real host passes some 110 for all its families. Those that ask
    for something this version cannot do raise UserError, so that no picture silently lacks it.
    """
    _refuse_unsupported(model_def, kwargs)
    seed = kwargs.get("seed")
    seed = int(seed) if seed is not None and int(seed) >= 0 else _random_seed()
    shift = kwargs.get("shift") if model_def.get("flow_shift") else None
    return GenerateRequest(
        prompt=kwargs.get("input_prompt") or "",
        negative_prompt=kwargs.get("n_prompt") or "",
        width=int(kwargs.get("width") or 1024),
        height=int(kwargs.get("height") or 1024),
        steps=int(kwargs.get("sampling_steps", 8)),
        seeds=tuple(seed + i for i in range(int(kwargs.get("batch_size") or 1))),
        sampler=kwargs.get("sample_solver") or "",
        shift=float(shift or DEFAULT_SHIFT),
        guidance=ClassifierFreeGuidance(
            scale=float(kwargs.get("guide_scale") or 0.0),
            normalization=float(kwargs.get("cfg_normalization") or 0.0),
            truncation=float(kwargs.get("cfg_truncation") or 1.0),
        ),
        tile=_tile(kwargs.get("VAE_tile_size")),
    )


def _refuse_unsupported(model_def: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    asked = [
        (float(kwargs.get("NAG_scale") or 1.0) > 1.0, "NAG (NAG_scale above 1)"),
        (kwargs.get("input_frames") is not None, "a control picture"),
        (kwargs.get("input_masks") is not None, "an inpainting mask"),
        (bool(kwargs.get("input_ref_images")), "reference pictures"),
        (kwargs.get("vae_upsampler") is not None, "a VAE upsampler"),
        (bool(model_def.get("unified_solver")), "TwinFlow's unified sampler"),
    ]
    missing = [what for wanted, what in asked if wanted]
    if missing:
        raise UserError(f"This version cannot draw with {', '.join(missing)} yet.", "Leave it out to draw without.")


def _tile(value: Any) -> int:
    """VAE_tile_size is a number of latent cells, or (on, cells); 0 and None are off."""
    if isinstance(value, (list, tuple)):
        on, *cells = value
        return int(cells[0]) if on and cells else 0
    return max(int(value or 0), 0)


def _random_seed() -> int:
    import torch

    return int(torch.randint(0, 2**31 - 1, ()).item())

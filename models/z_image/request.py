"""One generation as the pipeline needs it, and the only place that knows what hosts call its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models.z_image.conditions import Control, Start
from models.z_image.control_config import ControlConfig
from models.z_image.diversity import Diversity
from models.z_image.editing import conditions_from_host
from models.z_image.guidance import NAG_ALPHA, NAG_TAU, ClassifierFreeGuidance, NormalizedAttentionGuidance
from models.z_image.noise import Variation
from shared import samplers
from shared.quant.errors import UserError
from shared.samplers import schedules

if TYPE_CHECKING:
    from PIL import Image

    from models.z_image.text_encoder import LongPrompt

# Pictures are 8x the latents, patches 2x2 latents.
SIZE_MULTIPLE = 16
# Tongyi-MAI/Z-Image src/config/model.py: Turbo's scheduler.
DEFAULT_SHIFT = 3.0
PRECISIONS = ("fast", "exact")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Everything that decides a picture. Image i of the batch starts from noise drawn with seeds[i]."""

    prompt: str
    negative_prompt: str = ""
    long_prompt: LongPrompt = "keep"  # what becomes of a prompt beyond 512 tokens, see TextEncoder.encode
    width: int = 1024  # pixels, a multiple of 16
    height: int = 1024
    steps: int = 8  # of the sampler
    seeds: tuple[int, ...] = (0,)
    variation: Variation | None = None
    sampler: str = ""
    schedule: str = ""  # a name out of shared.samplers.schedules; empty for the sampler's own
    sigmas: tuple[float, ...] = ()  # a schedule of one's own instead, falling to 0; its length decides the steps
    shift: float = DEFAULT_SHIFT
    guidance: ClassifierFreeGuidance = field(default_factory=ClassifierFreeGuidance)
    nag: NormalizedAttentionGuidance = field(default_factory=NormalizedAttentionGuidance)
    diversity: Diversity = field(default_factory=Diversity)
    start: Start | None = None  # a picture to start from; None starts from noise alone
    control: Control | None = None  # a control picture; None draws without
    references: tuple[Image.Image, ...] = ()  # pictures to go by, for Omni and Edit
    tile: int = 0  # side of a decoding tile in latent cells, 0 in one piece
    precision: str = "fast"  # or "exact": bfloat16 rounded where the reference implementation does, see shared.ops
    step_cache: float = 0.0  # above 0: error up to which a step's answer is used again, see step_cache.py; lossy

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
        if self.sampler and self.sampler not in samplers.names():
            raise UserError(f"There is no sampler {self.sampler!r}.", f"Known: {', '.join(samplers.names())}.")
        if self.schedule and self.schedule not in schedules.SCHEDULES:
            raise UserError(f"There is no schedule {self.schedule!r}.", f"Known: {', '.join(schedules.SCHEDULES)}.")
        if self.precision not in PRECISIONS:
            raise UserError(f"There is no precision {self.precision!r}.", f"Known: {', '.join(PRECISIONS)}.")
        if not 0 <= self.step_cache < 1:
            raise UserError(f"The step cache's error {self.step_cache} is not from 0 to 1.", "0 is off; try 0.1.")
        if self.variation is not None and len(self.variation.seeds) != len(self.seeds):
            raise UserError(
                f"{len(self.variation.seeds)} variation seeds for {len(self.seeds)} pictures.", "Give one per picture."
            )

    @property
    def needs_negative(self) -> bool:
        """Whether the negative prompt has any part in the picture."""
        return self.guidance.scale > 0 or self.nag.active

    def noise_levels(self) -> list[float]:
        """The sigmas of the whole walk. Raises UserError for typed sigmas that do not fall to 0."""
        if self.sigmas:
            try:
                return schedules.custom(self.sigmas)
            except ValueError as error:
                raise UserError(f"{error}; got {list(self.sigmas)}.", "Example: 1, 0.9, 0.75, 0.5, 0.25.") from error
        steps = samplers.steps_of(self.sampler, self.steps)
        schedule = schedules.SCHEDULES[self.schedule] if self.schedule else samplers.get(self.sampler).schedule
        return schedule(steps, self.shift)


def from_host_kwargs(
    model_def: Mapping[str, Any],
    kwargs: Mapping[str, Any],
    branch: ControlConfig | None = None,
    *,
    takes_references: bool = False,
) -> GenerateRequest:
    """Translate generate()'s keywords (wan2gp-contract C1d) into a request.

    branch: of the model's control branch, if it has one. takes_references: whether it is an Omni or Edit model.
    Keywords not named here are ignored on purpose: a real host passes some 110 for all its families. Those that ask for
    something this version cannot do raise UserError, so that no picture silently lacks it.
    """
    _refuse_unsupported(kwargs, takes_references)
    seed = kwargs.get("seed")
    seed = int(seed) if seed is not None and int(seed) >= 0 else _random_seed()
    seeds = tuple(seed + i for i in range(int(kwargs.get("batch_size") or 1)))
    shift = kwargs.get("shift") if model_def.get("flow_shift") else None
    guidance, nag = _guidance(kwargs)
    sampler = kwargs.get("sample_solver") or ""
    if model_def.get("unified_solver") and sampler in ("", "default"):
        sampler = samplers.UNIFIED
    width, height = int(kwargs.get("width") or 1024), int(kwargs.get("height") or 1024)
    start, control = conditions_from_host(kwargs, branch, width=width, height=height)
    return GenerateRequest(
        prompt=kwargs.get("input_prompt") or "",
        negative_prompt=kwargs.get("n_prompt") or "",
        long_prompt=kwargs.get("long_prompt") or "keep",
        width=width,
        height=height,
        start=start,
        control=control,
        references=tuple(kwargs.get("input_ref_images") or ()),
        steps=int(kwargs.get("sampling_steps", 8)),
        seeds=seeds,
        variation=_variation(kwargs, seeds),
        sampler=sampler,
        schedule=kwargs.get("schedule") or "",
        sigmas=tuple(kwargs.get("sigmas") or ()),
        shift=float(shift or DEFAULT_SHIFT),
        guidance=guidance,
        nag=nag,
        diversity=Diversity(_number(kwargs, "diversity", 0.0), _number(kwargs, "diversity_end", Diversity().end)),
        tile=_tile(kwargs.get("VAE_tile_size")),
        precision=kwargs.get("precision") or "fast",
        step_cache=_number(kwargs, "step_cache", 0.0),
    )


def _guidance(kwargs: Mapping[str, Any]) -> tuple[ClassifierFreeGuidance, NormalizedAttentionGuidance]:
    """The two ways of guiding, of which at most one is on.

    As in Wan2GP, NAG works without classifier-free guidance: it is on if NAG_scale is above 1 and guide_scale is not.
    """
    scale = float(kwargs.get("guide_scale") or 0.0)
    nag = NormalizedAttentionGuidance(
        scale=float(kwargs.get("NAG_scale") or 1.0),
        tau=_number(kwargs, "NAG_tau", NAG_TAU),
        alpha=_number(kwargs, "NAG_alpha", NAG_ALPHA),
    )
    if nag.active and scale <= 1:
        return ClassifierFreeGuidance(), nag
    guidance = ClassifierFreeGuidance(
        scale=scale,
        normalization=float(kwargs.get("cfg_normalization") or 0.0),
        truncation=float(kwargs.get("cfg_truncation") or 1.0),
    )
    return guidance, NormalizedAttentionGuidance()


def _number(kwargs: Mapping[str, Any], key: str, usual: float) -> float:
    """The number given, of which 0 is one; the usual one for None and nothing."""
    value = kwargs.get(key)
    return usual if value is None else float(value)


def _variation(kwargs: Mapping[str, Any], seeds: tuple[int, ...]) -> Variation | None:
    strength = float(kwargs.get("variation_strength") or 0.0)
    if strength <= 0:
        return None
    first = int(kwargs.get("variation_seed") or 0)
    return Variation(strength, tuple(first + i for i in range(len(seeds))))


def _refuse_unsupported(kwargs: Mapping[str, Any], takes_references: bool) -> None:
    if kwargs.get("input_ref_images") and not takes_references:
        raise UserError(
            "This model does not look at reference pictures.", "Omni and Edit models do; leave them out for others."
        )
    asked = [
        (kwargs.get("vae_upsampler") is not None, "a VAE upsampler"),
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

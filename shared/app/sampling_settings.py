"""The settings of the walk from noise to picture beyond steps and sampler: where it stops, whose noise, how diverse."""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from shared.app.schema import SETTING_KEYS, describe
from shared.quant.errors import UserError
from shared.samplers import schedules

LONG_PROMPT_FATES = ("keep", "cut", "refuse")
PRECISIONS = ("fast", "exact")
MAX_STEP_CACHE = 0.5  # share of the velocity; beyond, nothing of the picture is left
MAX_DRAWN_SEED = 2**31 - 1  # short enough to be read out and typed again
MAX_SEED = 2**63 - 1  # what torch.Generator.manual_seed takes as a signed 64-bit number

# key -> (lowest, highest) allowed value
_RANGES: Mapping[str, tuple[float, float]] = {
    "variation_strength": (0, 1),
    "variation_seed": (-1, MAX_SEED),
    "diversity": (0, 10),
    "diversity_end": (0, 1),
    "step_cache": (0, MAX_STEP_CACHE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """Field names are settings keys, none of which Wan2GP has, and keywords of `generate`.

    schedule: a name out of SCHEDULES, "" for the sampler's own. sigmas: noise levels instead, falling to the 0 that is
    left out; as many as steps. variation_seed: -1 without a variation. long_prompt: one of LONG_PROMPT_FATES.
    precision: one of PRECISIONS. step_cache: error up to which a step's answer is used again, 0 is off; lossy.
    """

    schedule: str = ""
    sigmas: tuple[float, ...] = ()
    variation_strength: float = 0.0
    variation_seed: int = -1
    diversity: float = 0.0
    diversity_end: float = 0.25
    long_prompt: str = "keep"
    precision: str = "fast"
    step_cache: float = 0.0

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> SamplingSettings:
        """Check the values of these keys. A variation seed of -1 is drawn here if there is a variation.

        Raises UserError naming the key, what it got and what is allowed.
        """
        for key, (lowest, highest) in _RANGES.items():
            if not lowest <= values[key] <= highest:
                raise UserError(f'"{key}" must be from {lowest} to {highest}, got {values[key]}.')
        settings = cls(
            schedule=known_name("schedule", values["schedule"], tuple(schedules.SCHEDULES)),
            sigmas=_sigmas(values["sigmas"]),
            long_prompt=known_name("long_prompt", values["long_prompt"], LONG_PROMPT_FATES) or "keep",
            precision=known_name("precision", values["precision"], PRECISIONS) or "fast",
            step_cache=float(values["step_cache"]),
        )
        if values["variation_strength"]:
            seed = int(values["variation_seed"])
            seed = seed if seed >= 0 else random.SystemRandom().randint(0, MAX_DRAWN_SEED)
            settings = replace(settings, variation_strength=float(values["variation_strength"]), variation_seed=seed)
        if values["diversity"]:
            end = float(values["diversity_end"])
            settings = replace(settings, diversity=float(values["diversity"]), diversity_end=end)
        return settings

    def for_image(self, index: int) -> SamplingSettings:
        """Those of image `index` of a batch alone: its own variation seed."""
        return replace(self, variation_seed=self.variation_seed + index) if self.variation_strength else self

    def as_record(self) -> dict[str, Any]:
        """The settings that are not the usual ones."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in found.items()
            if value != SETTING_KEYS[key].default
        }

    def host_kwargs(self) -> dict[str, Any]:
        return asdict(self)


def known_name(key: str, name: str, known: Sequence[str]) -> str:
    """ "" or a known name. Raises UserError listing them, and the closest."""
    if name in ("", *known):
        return name
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f'The closest is "{closest[0]}".' if closest else ""
    raise UserError(f'"{key}" must be one of {", ".join(known)} or empty, got "{name}".', hint)


def _sigmas(values: Sequence[float]) -> tuple[float, ...]:
    if not values:
        return ()
    try:
        return tuple(schedules.custom(values)[:-1])
    except ValueError as error:
        raise UserError(f'"sigmas": {error}; got {describe(list(values))}.', "Example: 1, 0.9, 0.75, 0.5.") from error

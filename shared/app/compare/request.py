"""What a comparison is asked for, and the pictures it draws with each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.presets import LoraChoice, Preset
from shared.app.settings import GenerationSettings, loras_as_host_settings

if TYPE_CHECKING:
    pass


DEFAULT_COUNT = 32
ALL = "all"
FIRST_SEED = 20_000  # picture i is drawn with this seed + i

PROMPTS: tuple[str, ...] = (
    "a lighthouse at dusk",
    "a bowl of ripe cherries on a wooden table",
    "an old street in the rain, reflections of neon signs",
    "a portrait of an elderly fisherman, weathered face",
    "a red fox in fresh snow",
    'a shop window with the words "OPEN TODAY"',
    "a glass teapot with green tea, morning light",
    "a mountain lake seen from above",
)
"""What is drawn with a preset that has no scorer, over and over with other seeds."""


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """What the command line asks for.

    formats: names to write the preset's transformer in, or ("all",). files: further transformers, as they are.
    prompts: instead of the scorer's. settings: host keys for all pictures. scorer: "" for the preset's own.
    lora_count: prompts that are drawn with the LoRA too; 0 for all.
    jobs: models that are drawn with at a time, sharing the CPU's cores.
    """

    preset: str
    output: Path
    formats: Sequence[str] = ()
    files: Sequence[Path] = ()
    prompts: Sequence[str] = ()
    count: int = DEFAULT_COUNT
    settings: Mapping[str, Any] = field(default_factory=dict)
    lora: LoraChoice | None = None
    scorer: str = ""
    lora_count: int = 0
    jobs: int = 1


def repeated(prompts: Sequence[str], count: int) -> list[str]:
    """So many prompts, these in turn."""
    return [prompts[index % len(prompts)] for index in range(count)]


def pictures_of(request: CompareRequest, prompts: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Settings of each picture: all without the LoRA, then the first `lora_count` with it."""
    plain = [
        {**request.settings, "prompt": prompt, "seed": FIRST_SEED + index, "batch_size": 1}
        for index, prompt in enumerate(prompts)
    ]
    if request.lora is None:
        return tuple(plain)
    lora = loras_as_host_settings([request.lora])
    return (*plain, *({**settings, **lora} for settings in plain[: request.lora_count or None]))


def check_settings(preset: Preset, pictures: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError for settings that this preset does not take."""
    for settings in (pictures[0], pictures[-1]):
        GenerationSettings.build(preset, {}, settings)

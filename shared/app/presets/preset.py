"""A preset: a model to choose, with its weights, capabilities and default settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.app.loras import Strength, parse_strength

GB = 10**9  # bytes, as the Hub counts
_USER_CONFIG = 3  # the user's config is the fourth of the comma-separated positions in the setting "config"


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """A LoRA file (name below the LoRA folder, path or URL) and its strength in Wan2GP's notation."""

    file: str
    multiplier: str = "1"

    def strength(self) -> Strength:
        """The strength as numbers. Raises UserError for what is none."""
        return parse_strength(self.multiplier)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileWant:
    """A file that must be on this machine: its source, its purpose, its folder below the checkpoint root.

    published: bytes of it (of a file with several parts: of this part) by the preset, None where it does not say.
    """

    url: str
    role: str  # "transformer", "module", "text_encoder", "vae", "companion" or "preload"
    subfolder: str = ""
    published: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A model to choose: its weights (references resolved), capabilities and default settings.

    urls, text_encoder_urls, vae_urls: alternatives of one file each. modules: alternatives per module.
    model_def: the handler's definition with the JSON's "model" on top. settings: host key -> default value.
    companions: further files the family needs. published: bytes of weights files by role and URL, as far as they are
    stated. configs: name -> this preset with that set of model keys.
    files: the JSON files it came from, later ones laid over earlier ones. notes: what in them does nothing.
    """

    id: str
    name: str
    architecture: str
    family: str
    description: str
    urls: tuple[str, ...]
    modules: tuple[tuple[str, ...], ...]
    text_encoder_urls: tuple[str, ...]
    vae_urls: tuple[str, ...]
    preload_urls: tuple[str, ...]
    loras: tuple[LoraChoice, ...]
    companions: tuple[FileWant, ...]
    published: Mapping[tuple[str, str], int] = field(default_factory=dict)
    model_def: Mapping[str, Any]
    settings: Mapping[str, Any]
    configs: Mapping[str, Preset] = field(default_factory=dict)
    visible: bool = True
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def configured(self, selection: str) -> Preset:
        """The preset with the set of model keys that the setting "config" names (",,,name", or just "name").

        An unknown name means the preset itself, as in Wan2GP: a saved choice may outlive the set it names.
        """
        positions = selection.split(",")
        name = positions[_USER_CONFIG] if len(positions) > _USER_CONFIG else positions[0]
        return self.configs.get(name.strip(), self)


def pair_loras(files: Sequence[str], multipliers: Sequence[Any]) -> tuple[LoraChoice, ...]:
    """LoRA files with their strengths in order; missing strengths are 1."""
    padded = [*multipliers, *["1"] * len(files)]
    return tuple(LoraChoice(file, str(multiplier)) for file, multiplier in zip(files, padded, strict=False))

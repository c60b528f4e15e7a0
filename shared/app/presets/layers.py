"""Layers: preset files as they are read, each checked by itself, and how one is laid over another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.app.schema import check_model_keys, check_setting_keys, describe, read_json_object
from shared.quant.errors import UserError

# Place in "gigabytes" -> the key whose files it speaks of, and their role.
SIZED: Mapping[str, tuple[str, str]] = {
    "transformer": ("URLs", "transformer"),
    "modules": ("modules", "module"),
    "text_encoder": ("text_encoder_URLs", "text_encoder"),
    "VAE": ("VAE_URLs", "vae"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One preset file, checked by itself."""

    path: Path
    is_users: bool
    model: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str]


def read_layer(path: Path, is_users: bool) -> Layer:
    """Read and check one file. Raises UserError for a mistake in it."""
    settings = read_json_object(path)
    model = settings.pop("model", None)
    if not isinstance(model, dict):
        got = "none" if model is None else describe(model)
        raise UserError(f'{path}: a preset needs a "model" object, got {got}.', "See defaults/README.md.")
    notes = check_model_keys(str(path), model) + check_setting_keys(str(path), settings)
    return Layer(path=path, is_users=is_users, model=model, settings=settings, notes=notes)


def laid_over(model: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """A definition with further keys on top; sizes do not outlast the files that they were stated of."""
    merged = {**model, **further}
    if model.get("gigabytes") and "gigabytes" not in further:
        stated = model["gigabytes"]
        merged["gigabytes"] = {place: size for place, size in stated.items() if SIZED[place][0] not in further}
    return merged

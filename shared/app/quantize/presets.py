"""The preset whose settings a new file takes, and the one that is written for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.quantize.request import CONTROL, QuantizeRequest
from shared.app.quantize.result import write_json
from shared.app.schema import read_json_object
from shared.quant.recipe import Recipe

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.presets import Preset

FINETUNES = "finetunes"

# Place in "gigabytes" -> the key of "model" whose files it speaks of.
_KEYS = {"transformer": "URLs", "modules": "modules", "text_encoder": "text_encoder_URLs", "VAE": "VAE_URLs"}


def preset_like(ctx: AppContext, request: QuantizeRequest, kind: str) -> Preset | None:
    """The preset named, else the one that uses the source file; None for a ControlNet that no preset uses."""
    return plain_or_like(ctx, request) if kind != CONTROL or request.like else _user_of(ctx, request, kind)


def plain_or_like(ctx: AppContext, request: QuantizeRequest) -> Preset:
    """The preset named, else the one that uses the source file, else the plain Turbo model's."""
    if request.like:
        return ctx.presets.get(request.like)
    return _user_of(ctx, request, "transformer") or ctx.presets.get("z_image")


def _user_of(ctx: AppContext, request: QuantizeRequest, kind: str) -> Preset | None:
    """The first preset whose transformer, or whose module, the source file is."""
    source = request.source.resolve()

    def uses_source(preset: Preset) -> bool:
        urls = [url for module in preset.modules for url in module] if kind == CONTROL else preset.urls
        return any(path is not None and path.resolve() == source for path in map(ctx.files.find, urls))

    return next((preset for preset in ctx.presets.presets.values() if uses_source(preset)), None)


def register(ctx: AppContext, like: Preset, request: QuantizeRequest, recipe: Recipe, kind: str, output: Path) -> str:
    """Write a preset for the new file into finetunes/; returns its id. output: what of it is opened."""
    url = str(output.resolve())
    parts = {"text_encoder_URLs": request.text_encoder, "VAE_URLs": request.vae}
    changes: dict[str, Any] = {
        "name": f"{like.name}, {recipe.path.stem}",
        "description": f"Converted from {request.source.name} by the recipe {recipe.path.stem}.",
        **({"modules": [[url]]} if kind == CONTROL else {"URLs": [url]}),
        **{key: [url] for key, file in parts.items() if file is not None},
    }
    return write_preset(ctx, like, request.output.stem, changes)


def write_preset(ctx: AppContext, like: Preset, name: str, changes: Mapping[str, Any]) -> str:
    """Write `like` with other keys of its "model" into finetunes/; returns the id, made from the name.

    A preset of that id that has the same files is replaced; with others, the new one gets a number.
    """
    merged: dict[str, Any] = {"model": {}}
    for path in like.files:
        found = read_json_object(path)
        merged = merged | found | {"model": merged["model"] | found.get("model", {})}
    # What the other preset's files weigh is not what these do, which are here to be weighed.
    stated = {
        place: size for place, size in merged["model"].get("gigabytes", {}).items() if _KEYS[place] not in changes
    }
    merged["model"] |= {**changes, "gigabytes": stated}
    if not stated:
        del merged["model"]["gigabytes"]
    base = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "converted"
    folder = ctx.root / FINETUNES
    folder.mkdir(exist_ok=True)
    files = [url for key in ("URLs", "modules") for url in changes.get(key, ())]
    names = [base, *(f"{base}_{number}" for number in range(2, 1000))]
    known = {name: [p.urls, *p.modules] for name, p in ctx.presets.presets.items()}
    preset_id = next(name for name in names if name not in known or all(_one_file(url) in known[name] for url in files))
    write_json(folder / f"{preset_id}.json", merged)
    return preset_id


def _one_file(url: str | list[str]) -> tuple[str, ...]:
    return (url,) if isinstance(url, str) else tuple(url)

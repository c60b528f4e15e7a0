"""The preset whose settings a new file takes, and the one that is written for it."""

from __future__ import annotations

import re
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
    merged: dict[str, Any] = {"model": {}}
    for path in like.files:
        found = read_json_object(path)
        merged = merged | found | {"model": merged["model"] | found.get("model", {})}
    url = str(output.resolve())
    parts = {"text_encoder_URLs": request.text_encoder, "VAE_URLs": request.vae}
    merged["model"] |= {
        "name": f"{like.name}, {recipe.path.stem}",
        "description": f"Converted from {request.source.name} by the recipe {recipe.path.stem}.",
        **({"modules": [[url]]} if kind == CONTROL else {"URLs": [url]}),
        **{key: [url] for key, file in parts.items() if file is not None},
    }
    base = re.sub(r"[^a-z0-9]+", "_", request.output.stem.lower()).strip("_") or "converted"
    folder = ctx.root / FINETUNES
    folder.mkdir(exist_ok=True)
    names = [base, *(f"{base}_{number}" for number in range(2, 1000))]
    known = {name: ((*p.urls,), *p.modules) for name, p in ctx.presets.presets.items()}
    preset_id = next(name for name in names if name not in known or (url,) in known[name])
    write_json(folder / f"{preset_id}.json", merged)
    return preset_id

"""`presets --add`: a weights file that lies somewhere becomes a preset, by what its tensors say.

    file -> what it is (inspection) -> the preset whose settings and other parts it takes -> finetunes/<name>.json

A transformer takes over everything but itself; a checkpoint of all three parts brings its text encoder and VAE. Which
preset that is, the family says where tensors tell (`like` in its description); a smaller or larger network takes the
first preset whose own transformer is here and has the same sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.inspection import describe_checkpoint, inspect_path, unreadable
from shared.app.quantize.presets import write_preset
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.presets import Preset

_KEYS = {"transformer": "URLs", "text encoder": "text_encoder_URLs", "VAE": "VAE_URLs"}


@dataclass(frozen=True, kw_only=True)
class Added:
    """What became of a file. preset: its id, also of one that was there before; "" where none was made. words: why."""

    file: Path
    summary: str
    preset: str
    words: str


def add_presets(ctx: AppContext, paths: Sequence[Path], like: str = "") -> list[Added]:
    """Write a preset for each transformer at the paths, folders searched below. like: whose settings all take.

    What is no transformer, or has a preset already, is told and left. Raises UserError for a `like` that is not there.
    """
    wanted = ctx.presets.get(like) if like else None
    added = []
    for description in _descriptions(ctx, paths):
        added.append(_add(ctx, description, wanted))
        if added[-1].preset:
            ctx.refresh_presets()
    return added


def _descriptions(ctx: AppContext, paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        try:
            yield from inspect_path(path, ctx.families.infos)
        except CheckpointError as error:
            yield unreadable(path, error)


def _add(ctx: AppContext, description: dict[str, Any], like: Preset | None) -> Added:
    file = Path(description["file"]).absolute()

    def said(words: str, preset: str = "") -> Added:
        return Added(file=file, summary=description["summary"], preset=preset, words=words)

    if description["kind"] not in ("transformer", "checkpoint"):
        return said(_NO_PRESET.get(description["kind"], "no preset is made of it"))
    if description["problems"]:
        return said(f"no preset is made of it: {description['problems'][0]}")
    if (known := _preset_of(ctx, file)) is not None:
        return said("is the transformer of this preset already", known.id)
    try:
        like = like or _like(ctx, description)
    except UserError as error:
        return said(str(error))
    changes: dict[str, Any] = {
        "name": file.stem,
        "description": f"{description['summary']} in {file.name}; settings like {like.id}.",
        **{_KEYS[part]: [str(file)] for part in description["contains"]},
    }
    return said(f"settings like {like.id}", write_preset(ctx, like, file.stem, changes))


_NO_PRESET = {
    "lora": "a LoRA goes with a model: --lora, or the LoRA folder",
    "control": "a ControlNet goes with a model: `modules` of a preset (docs/control.md)",
    "text_encoder": "goes with a model: `text_encoder_URLs` of a preset",
    "vae": "goes with a model: `VAE_URLs` of a preset",
    "unreadable": "cannot be read",
}


def _preset_of(ctx: AppContext, file: Path) -> Preset | None:
    for preset in ctx.presets.presets.values():
        if any(found is not None and found.resolve() == file.resolve() for found in map(ctx.files.find, preset.urls)):
            return preset
    return None


def _like(ctx: AppContext, description: dict[str, Any]) -> Preset:
    """The preset that the family names, else one whose transformer has the same sizes. UserError without either."""
    if description.get("like"):
        return ctx.presets.get(description["like"])
    for preset in ctx.presets.presets.values():
        if preset.visible and not preset.modules and description["sizes"] == _sizes(ctx, preset):
            return preset
    raise UserError("No preset has a network of these sizes.", "Name the one whose settings it takes with --like.")


def _sizes(ctx: AppContext, preset: Preset) -> dict[str, Any] | None:
    found = next((path for path in map(ctx.files.find, preset.urls) if path is not None), None)
    if found is None:
        return None
    try:
        sizes: dict[str, Any] | None = describe_checkpoint(Checkpoint.open(found), {preset.family: None}).get("sizes")
    except CheckpointError:  # damaged: drawing with that preset will say so
        return None
    return sizes

"""What is known of a conversion before anything is written: the family, the recipe, the model, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.inspection import describe_checkpoint
from shared.app.loras import match_words
from shared.app.quantize.checks import (
    check_control,
    check_flags,
    check_keep,
    check_lora_paths,
    check_numbers,
    check_paths,
)
from shared.app.quantize.presets import preset_like
from shared.app.quantize.recipes import opened_recipe, read_recipe
from shared.app.quantize.request import CONTROL, QuantizeRequest
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import UserError
from shared.quant.formats import format_of
from shared.quant.recipe import Recipe
from shared.quant.sensitivity import AUTO

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.presets import Preset
    from shared.quant.convert import Conversion, Model
    from shared.quant.targets import Target

_KINDS = ("transformer", "checkpoint", CONTROL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """family: its conversion module. kind: of the source, one of _KINDS. like: the preset to be like, None for none.

    known: formats by name. is_auto: whether the recipe leaves formats open. notes: on LoRAs that were merged.
    """

    family: Any
    kind: str
    like: Preset | None
    recipe: Recipe
    known: Mapping[str, Target]
    is_auto: bool
    model: Model
    notes: Sequence[str]
    conversion: Conversion


def prepare(ctx: AppContext, request: QuantizeRequest) -> Prepared:
    """Read the source's header and the recipe, and check both. Raises UserError for what cannot be done."""
    from shared.quant.convert import plan_conversion
    from shared.quant.targets import PLAIN, targets

    check_paths(request)
    check_lora_paths(request)
    family, kind = _family_of(ctx, request.source)
    if kind == CONTROL:
        check_control(request)
    like = preset_like(ctx, request, kind) if request.with_preset else None
    known = targets()
    recipe = read_recipe(request, family.RECIPES, [*known, *PLAIN, AUTO])
    is_auto = any(rule.format == AUTO for rule in recipe.rules)
    check_numbers(request, is_auto)
    model, notes = _merged(family, family.open_model(request.source), request)
    conversion = plan_conversion(
        model, opened_recipe(recipe, request.is_gguf), known, gguf=request.is_gguf, diffusers=request.diffusers
    )
    check_keep(request, conversion)
    check_flags(request, conversion, is_auto)
    return Prepared(
        family=family,
        kind=kind,
        like=like,
        recipe=recipe,
        known=known,
        is_auto=is_auto,
        model=model,
        notes=notes,
        conversion=conversion,
    )


def _family_of(ctx: AppContext, source: Path) -> tuple[Any, str]:
    """The conversion module of the family that the file belongs to, and what kind of file it is."""
    checkpoint = Checkpoint.open(source)
    for family in ctx.families.infos:
        name = f"models.{family}.conversion"
        if util.find_spec(name) is None:
            continue
        described = describe_checkpoint(checkpoint, {family: None})
        if described["kind"] in _KINDS:
            return import_module(name), described["kind"]
    described = describe_checkpoint(checkpoint, ctx.families.infos)
    raise UserError(
        f"{source}: {described['summary']}; only transformers and ControlNets can be converted.",
        "`wgp.py inspect FILE` says more.",
    )


def _merged(family: Any, model: Model, request: QuantizeRequest) -> tuple[Model, list[str]]:
    """The model with the LoRAs that are to be merged, and what is to be said about them."""
    if not request.merge_loras:
        return model, []
    merged, matches = family.merge(model, request.merge_loras)
    notes = [f"merged {match_words(match.as_dict())}" for match in matches]
    if packed := sum(format_of(part.layer) is not None for parts in model.plan.values() for part in parts):
        notes.append(
            f"{packed} layers of {request.source.name} are packed already: what they lost stays lost, "
            "the LoRA is merged into what they hold."
        )
    return merged, notes

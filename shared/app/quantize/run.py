"""A conversion from the request to the report and the preset."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib import import_module, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.inspection import describe_checkpoint
from shared.app.loras import match_words
from shared.app.memory import peak_rss_mb
from shared.app.quantize.checks import (
    check_control,
    check_flags,
    check_keep,
    check_lora_paths,
    check_numbers,
    check_paths,
)
from shared.app.quantize.choosing import Choosing
from shared.app.quantize.presets import plain_or_like, preset_like, register
from shared.app.quantize.recipes import opened_recipe, read_recipe, recipe_path, rules_of
from shared.app.quantize.request import CONTROL, QuantizeRequest
from shared.app.quantize.result import Chosen, QuantizeResult, write_json
from shared.quant.checkpoint import Checkpoint
from shared.quant.error_lora import path_beside
from shared.quant.errors import UserError
from shared.quant.formats import format_of
from shared.quant.recipe import Recipe
from shared.quant.sensitivity import AUTO

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.quant.convert import Conversion, Model, OnProgress
    from shared.quant.inputs import Inputs
    from shared.quant.layout import Layout

_KINDS = ("transformer", "checkpoint", CONTROL)
_NO_CALIBRATION = (
    "SVDQuant without calibration: no activations were looked at, so nothing is smoothed; "
    "the low-rank branch makes up for the weights' rounding only."
)


def quantize(ctx: AppContext, request: QuantizeRequest, on_progress: OnProgress) -> QuantizeResult:
    """Convert, then write OUT.report.json and the preset. Raises UserError before anything is written where it can."""
    from shared.quant.convert import Means, convert, convert_to_gguf, expected_bytes, output_files, plan_conversion
    from shared.quant.layout import opened
    from shared.quant.targets import DEFAULT_RANK, PLAIN, targets

    started = time.monotonic()
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
    model = family.open_model(request.source)
    model, notes = _merged(family, model, request)
    is_gguf = request.is_gguf
    conversion = plan_conversion(
        model, opened_recipe(recipe, is_gguf), known, gguf=is_gguf, diffusers=request.diffusers
    )
    check_keep(request, conversion)
    check_flags(request, conversion, is_auto)
    layout = _layout(request, family)
    rank = request.rank or DEFAULT_RANK
    means = Means(rank=rank, learned_rounding=request.learned_rounding, error_lora_rank=request.error_lora_rank)
    prompts = tuple(request.prompts or family.calibration_prompts(model.config)) if request.calibrate else ()
    if request.calibrate:
        means = replace(means, inputs=_calibrated(ctx, request, prompts, conversion, on_progress))
    chosen: list[Chosen] = []
    if is_auto:
        choosing = Choosing(request, recipe, family, model, known, means, on_progress)
        recipe, chosen, conversion = choosing.best()
    metadata = _header(family, model, conversion, request, rank)
    identity = _identity(request, model, recipe, rank, prompts, layout)
    if is_gguf:
        files = [request.file]
        layers = convert_to_gguf(
            conversion,
            request.output,
            metadata=metadata,
            identity=identity,
            on_progress=on_progress,
            means=means,
        )
    else:
        files = list(output_files(conversion, request.file, layout, rank))
        layers = convert(
            conversion,
            request.file,
            rank=rank,
            metadata=metadata,
            identity=identity,
            on_progress=on_progress,
            means=means,
            layout=layout,
        )
    if request.diffusers:
        write_json(request.output / "config.json", model.config)
    output = opened(request.file, files)
    result = QuantizeResult(
        output=output,
        report=request.output.with_name(f"{request.output.name}.report.json"),
        bytes=sum(file.stat().st_size for file in files),
        seconds=time.monotonic() - started,
        peak_rss_mb=peak_rss_mb(),
        layers=layers,
        notes=(*notes, *((_NO_CALIBRATION,) if conversion.has_rank and not request.calibrate else ())),
        preset=register(ctx, like, request, recipe, kind, output) if like else "",
        error_lora=path_beside(request.output) if request.error_lora_rank else None,
        chosen=chosen,
        expected_bytes=expected_bytes(conversion, metadata, rank) if is_auto else None,
    )
    _write_report(request, recipe, result, rank if conversion.has_rank else None, prompts)
    if is_auto:
        write_json(recipe_path(request.output), {"description": recipe.description, "rules": rules_of(recipe)})
    return result


def _header(family: Any, model: Model, conversion: Conversion, request: QuantizeRequest, rank: int) -> dict[str, str]:
    """What the new file's header says beside its tensors."""
    metadata = family.header(
        "official" if request.is_gguf else conversion.naming, conversion.formats, model.config, rank
    )
    if request.diffusers:
        metadata = {"format": "pt"}
    elif request.is_gguf:
        metadata = {"config": metadata["config"]}
    metadata = {**metadata, **family.companions_header(request.vae)}
    if request.calibrate:
        seen = {"pictures": request.calibrate, "learned_rounding": request.learned_rounding}
        metadata["calibration"] = json.dumps(seen)
    return metadata


def _write_report(
    request: QuantizeRequest, recipe: Recipe, result: QuantizeResult, rank: int | None, prompts: Sequence[str]
) -> None:
    """OUT.report.json. rank: of the low-rank branch, None without one."""
    calibration = {"pictures": request.calibrate, "prompts": list(prompts)} if request.calibrate else None
    said = {"source": str(request.source), "recipe": str(recipe.path), "rank": rank, "calibration": calibration}
    everything = {"every_layer": [asdict(r) for r in result.layers], "chosen": [asdict(c) for c in result.chosen]}
    write_json(result.report, said | result.as_dict() | everything)


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


def _calibrated(
    ctx: AppContext, request: QuantizeRequest, prompts: Sequence[str], conversion: Conversion, on_progress: OnProgress
) -> Callable[[str], Inputs | None]:
    """What our modules were seen to take while the model drew."""
    from shared.app.calibration import Drawings, watch

    drawings = Drawings(
        source=request.source,
        like=plain_or_like(ctx, request),
        prompts=prompts,
        count=request.calibrate,
        loras=request.merge_loras,
    )
    return watch(ctx, drawings, lambda words: on_progress(0, conversion.numbers, words)).inputs


def _layout(request: QuantizeRequest, family: Any) -> Layout:
    from shared.quant.layout import Layout

    if request.text_encoder is None and request.vae is None:
        return Layout(shard_bytes=request.shard_size)
    carried = family.companions(request.text_encoder, request.vae)
    return Layout(shard_bytes=request.shard_size, prefix=family.CHECKPOINT_PREFIX, carried=carried)


def _identity(
    request: QuantizeRequest, model: Model, recipe: Recipe, rank: int, prompts: Sequence[str], layout: Layout
) -> dict[str, Any]:
    """What must be the same for an unfinished file to be gone on with."""
    return {
        "source": _stamps(model.checkpoint.files),
        "rules": rules_of(recipe),
        "rank": rank,
        "error_lora": request.error_lora_rank,
        "calibrated": [request.calibrate, *prompts],
        "learned_rounding": request.learned_rounding,
        "merged": [[*_stamps([path]), strength] for path, strength in request.merge_loras],
        "carried": [[c.name, *_stamps(c.checkpoint.files)] for c in layout.carried],
    }


def _stamps(files: Sequence[Path]) -> list[list[Any]]:
    """What tells that files are still the same."""
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]

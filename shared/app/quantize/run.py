"""A conversion from the request to the report and the preset."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.memory import peak_rss_mb
from shared.app.quantize.choosing import Choosing
from shared.app.quantize.preparation import prepare
from shared.app.quantize.presets import plain_or_like, register
from shared.app.quantize.recipes import recipe_path, rules_of
from shared.app.quantize.request import QuantizeRequest
from shared.app.quantize.result import Chosen, QuantizeResult, write_json
from shared.quant.error_lora import path_beside
from shared.quant.recipe import Recipe

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.quant.convert import Conversion, Model, OnProgress
    from shared.quant.inputs import Inputs
    from shared.quant.layout import Layout

_NO_CALIBRATION = (
    "SVDQuant without calibration: no activations were looked at, so nothing is smoothed; "
    "the low-rank branch makes up for the weights' rounding only."
)


def quantize(ctx: AppContext, request: QuantizeRequest, on_progress: OnProgress) -> QuantizeResult:
    """Convert, then write OUT.report.json and the preset. Raises UserError before anything is written where it can."""
    from shared.quant.convert import Means, convert, convert_to_gguf, expected_bytes, output_files
    from shared.quant.layout import opened
    from shared.quant.targets import DEFAULT_RANK

    started = time.monotonic()
    prepared = prepare(ctx, request)
    family, model, recipe, conversion = prepared.family, prepared.model, prepared.recipe, prepared.conversion
    layout = _layout(request, family)
    rank = request.rank or DEFAULT_RANK
    means = Means(rank=rank, learned_rounding=request.learned_rounding, error_lora_rank=request.error_lora_rank)
    prompts = tuple(request.prompts or family.calibration_prompts(model.config)) if request.calibrate else ()
    if request.calibrate:
        means = replace(means, inputs=_calibrated(ctx, request, prompts, conversion, on_progress))
    chosen: list[Chosen] = []
    if prepared.is_auto:
        choosing = Choosing(request, recipe, family, model, prepared.known, means, on_progress)
        recipe, chosen, conversion = choosing.best()
    metadata = _header(family, model, conversion, request, rank)
    identity = _identity(request, model, recipe, rank, prompts, layout)
    if request.is_gguf:
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
        notes=(*prepared.notes, *((_NO_CALIBRATION,) if conversion.has_rank and not request.calibrate else ())),
        preset=register(ctx, prepared.like, request, recipe, prepared.kind, output) if prepared.like else "",
        error_lora=path_beside(request.output) if request.error_lora_rank else None,
        chosen=chosen,
        expected_bytes=expected_bytes(conversion, metadata, rank) if prepared.is_auto else None,
    )
    _write_report(request, recipe, result, rank if conversion.has_rank else None, prompts)
    if prepared.is_auto:
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

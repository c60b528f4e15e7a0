"""One layer on its way: rows of the source, the new format's tensors, and how they came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shared.quant import error_lora
from shared.quant.convert.jobs import Job, LayerReport, Means, tensor_name
from shared.quant.convert.read_back import errors_of, missing
from shared.quant.errors import CheckpointError, UserError
from shared.quant.formats import format_of, read_checked
from shared.quant.recipe import KEPT
from shared.quant.targets import PLAIN, Target

if TYPE_CHECKING:
    from torch import Tensor


def converted(source: Path, job: Job, means: Means) -> tuple[dict[str, Tensor], LayerReport | None, dict[str, Tensor]]:
    """A module's tensors by suffix, how its matrix came out (None without one), and its error-correction LoRA."""
    plain = PLAIN.get(job.format, PLAIN[KEPT])
    tensors: dict[str, Tensor] = {}
    report = None
    pair: dict[str, Tensor] = {}
    for suffix, shape in job.shapes.items():
        if suffix != "weight" or len(shape) != 2:
            tensors[suffix] = _as_plain(source, job, suffix, plain)
            continue
        weight = rows_of(job, suffix)
        inputs = means.inputs(job.source)
        try:
            if job.target is None:
                made = {suffix: _as_plain(source, job, suffix, plain)}
            else:
                made = job.target.quantize(
                    weight, len(job.place.blocks), means.rank, inputs=inputs, learned_rounding=means.learned_rounding
                )
        except (UserError, ValueError) as error:
            hint = error.hint if isinstance(error, UserError) else ""
            raise UserError(f"{source}: {job.place.module} cannot become {job.format}: {error}", hint) from error
        nbytes = sum(t.numel() * t.element_size() for t in made.values())
        errors = errors_of(weight, made, job, inputs)
        corrected: tuple[float | None, float | None] = (None, None)
        if means.error_lora_rank and job.target:
            up, down = error_lora.correction(missing(weight, made, job), means.error_lora_rank, inputs)
            pair = error_lora.tensors_of(job.place, up, down)
            corrected = errors_of(weight, made, job, inputs, (up, down))
        report = LayerReport(job.place.module, job.format, shape, nbytes, *errors, *corrected)
        tensors |= made
    return tensors, report, pair


def converted_for_gguf(
    source: Path, job: Job, means: Means
) -> tuple[dict[str, Tensor], LayerReport | None, dict[str, Tensor]]:
    """converted() with the types of a GGUF file."""
    matrix = {suffix: shape for suffix, shape in job.shapes.items() if suffix == "weight" and len(shape) == 2}
    tensors, report, pair = converted(source, replace(job, shapes=matrix), means)
    others = {suffix: _as_plain(source, job, suffix, "F32") for suffix in job.shapes if suffix not in matrix}
    return tensors | others, report, pair


def sampled(job: Job, formats: Mapping[str, Target | None], means: Means, rows: int) -> tuple[Tensor, dict[str, float]]:
    """About `rows` rows of a job's weight, float32, and the relative error of each format (None: plain) on them.

    Of the outputs where inputs are known, else of the weight. Formats with a rank are tried on all rows.
    """
    whole = rows_of(job, "weight")
    weight = whole[:: -(-len(whole) // rows)].float()
    part = replace(job, shapes={"weight": tuple(weight.shape)})
    inputs = means.inputs(job.source)
    errors = {}
    for name, target in formats.items():
        if target is None:
            errors[name] = 0.0
            continue
        tried, shown = (whole.float(), job) if target.has_rank else (weight, part)
        made = target.quantize(tried, len(job.place.blocks) if target.has_rank else 1, means.rank, inputs=inputs)
        of_weight, of_outputs = errors_of(tried, made, replace(shown, format=name, target=target), inputs)
        errors[name] = of_weight if of_outputs is None else of_outputs
    return weight, errors


def rows_of(job: Job, suffix: str) -> Tensor:
    """The job's rows of one parameter, in the place's order; float32 where the source is packed or LoRAs are merged."""
    import torch

    rows = _blocks(job, suffix, job.place.blocks).reshape(job.shapes[suffix])
    for merge in job.merges:
        delta = merge.delta(job.source, suffix, lambda: _blocks(job, "weight", range(job.place.of)).float())
        if delta is not None:
            parts = delta.chunk(job.place.of)
            rows = rows.float() + torch.cat([parts[block] for block in job.place.blocks]).reshape(rows.shape)
    return rows


def _blocks(job: Job, suffix: str, blocks: Sequence[int]) -> Tensor:
    """These row blocks of the source's parameter, in this order."""
    import torch

    found: dict[int, Tensor] = {}
    for part in job.parts:
        if not set(part.blocks) & set(blocks):
            continue
        packed = format_of(part.layer) if suffix == "weight" else None
        whole = read_checked(packed, part.layer).dequantize(torch.float32) if packed else part.layer.load(suffix)[0]
        found |= dict(zip(part.blocks, whole.chunk(len(part.blocks)), strict=True))
    rows = [found[block] for block in blocks]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _as_plain(source: Path, job: Job, suffix: str, dtype: str) -> Tensor:
    """A parameter as numbers. Raises CheckpointError for NaN, infinity and what the type cannot hold."""
    import torch

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    plain = rows_of(job, suffix).to(types[dtype]).contiguous()
    if not plain.isfinite().all():
        name = tensor_name(job.place.module, suffix)
        raise CheckpointError(
            f"{source}: {name} holds numbers that are not finite, or too large for {dtype}.",
            "Download the file again." if dtype != "F16" else "Take bf16 if the file itself is sound.",
        )
    return plain

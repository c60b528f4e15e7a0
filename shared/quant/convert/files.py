"""A conversion's files, written layer by layer and gone on with after an interrupt."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from shared.quant import error_lora, gguf_file
from shared.quant.convert.jobs import Conversion, Job, LayerReport, Means, OnProgress, tensor_name
from shared.quant.convert.layers import converted, converted_for_gguf
from shared.quant.convert.sizes import file_tensors, name_room, output_files
from shared.quant.errors import RunError
from shared.quant.layout import Layout
from shared.quant.recipe import KEPT
from shared.quant.targets import PLAIN

if TYPE_CHECKING:
    from shared.quant.layout import ShardedWriter
    from shared.quant.safetensors_writer import SafetensorsWriter


def convert(
    conversion: Conversion,
    output: Path,
    *,
    rank: int,
    metadata: Mapping[str, str],
    identity: Any,
    on_progress: OnProgress,
    means: Means | None = None,
    layout: Layout | None = None,
) -> list[LayerReport]:
    """Write a safetensors file and say how each matrix came out. One layer is in memory at a time.

    identity: JSON-able; an unfinished file of the same identity is gone on with. means: instead of `rank` alone.
    layout: when it is not to be one file with nothing else in it.
    Raises UserError naming the layer that cannot be converted, RunError when the disk refuses.
    """
    means, layout = means or Means(rank=rank), layout or Layout()
    done = 0
    with ExitStack() as stack:
        corrections = _corrections(conversion, output, means, identity, stack)
        writer = _model_writer(conversion, output, layout, means, metadata, identity)
        stack.enter_context(writer)
        for job in conversion.jobs:
            module = job.place.module
            on_progress(done, conversion.numbers, module)
            corrected = corrections is None or job.target is None or module in corrections.finished
            if module not in writer.finished or not corrected:
                tensors, report, pair = converted(conversion.source, job, means)
                if corrections is not None and not corrected:
                    corrections.add(module, pair)
                if module not in writer.finished:
                    named = {f"{layout.prefix}{tensor_name(module, suffix)}": t for suffix, t in tensors.items()}
                    writer.add(module, named, asdict(report) if report else None)
            done += job.numbers
        for carried in (c for c in layout.carried if c.name not in writer.finished):
            on_progress(done, conversion.numbers, carried.name)
            writer.add(carried.name, {carried.name: carried.load()})
        for name, tensor in file_tensors(conversion).items():
            if name not in writer.finished:
                writer.add(name, {f"{layout.prefix}{name}": tensor})
        if corrections is not None:
            corrections.finish()
        writer.finish()
    notes = [writer.finished[job.place.module] for job in conversion.jobs]
    return [LayerReport(**note | {"shape": tuple(note["shape"])}) for note in notes if note]


def convert_to_gguf(
    conversion: Conversion,
    output: Path,
    *,
    metadata: Mapping[str, str],
    identity: Any = None,
    on_progress: OnProgress,
    means: Means | None = None,
) -> list[LayerReport]:
    """As convert(), into a GGUF file. identity: None for a run that none goes on with."""
    means = means or Means(rank=0)
    listing: dict[str, tuple[str, tuple[int, ...]]] = {}
    for job in conversion.jobs:
        listing |= {
            tensor_name(job.place.module, suffix): (_gguf_type(job, suffix), s) for suffix, s in job.shapes.items()
        }
    done = 0
    with ExitStack() as stack:
        corrections = _corrections(conversion, output, means, uuid4().hex if identity is None else identity, stack)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            writer = stack.enter_context(gguf_file.GgufWriter(output, listing, metadata=metadata, job=identity))
            for job in conversion.jobs:
                module = job.place.module
                on_progress(done, conversion.numbers, module)
                corrected = corrections is None or job.target is None or module in corrections.finished
                left = [suffix for suffix in job.shapes if tensor_name(module, suffix) not in writer.finished]
                if left or not corrected:
                    tensors, report, pair = converted_for_gguf(conversion.source, job, means)
                    if corrections is not None and not corrected:
                        corrections.add(module, pair)
                    for suffix in left:
                        note = asdict(report) if report and suffix == "weight" else None
                        writer.add(tensor_name(module, suffix), tensors[suffix], note)
                done += job.numbers
            writer.finish()
        except OSError as error:
            raise RunError(
                f"{output} could not be written: {error.strerror or error}.",
                "Look at the free space and the permissions there.",
            ) from error
        if corrections is not None:
            corrections.finish()
    return [LayerReport(**note | {"shape": tuple(note["shape"])}) for note in writer.finished.values() if note]


def _gguf_type(job: Job, suffix: str) -> str:
    """Other programs want small tensors, and the pad tokens (1, dim), in float32."""
    if suffix != "weight" or len(job.shapes[suffix]) != 2:
        return "F32"
    return f"{gguf_file.PREFIX}{job.target.gguf}" if job.target else PLAIN.get(job.format, PLAIN[KEPT])


def _writer(
    stack: ExitStack, path: Path, names: int, name_bytes: int, metadata: Mapping[str, str], identity: Any
) -> SafetensorsWriter:
    from shared.quant.safetensors_writer import SafetensorsWriter

    return stack.enter_context(
        SafetensorsWriter(path, names=names, name_bytes=name_bytes, metadata=metadata, job=identity)
    )


def _model_writer(
    conversion: Conversion, output: Path, layout: Layout, means: Means, metadata: Mapping[str, str], identity: Any
) -> SafetensorsWriter | ShardedWriter:
    from shared.quant.layout import ShardedWriter
    from shared.quant.safetensors_writer import SafetensorsWriter

    names, name_bytes = name_room(conversion)
    further = [carried.name for carried in layout.carried] + list(file_tensors(conversion))
    names, name_bytes = names + len(further), name_bytes + sum(len(name.encode()) for name in further)
    name_bytes += names * len(layout.prefix.encode())
    files = output_files(conversion, output, layout, means.rank)
    if len(files) == 1:
        return SafetensorsWriter(output, names=names, name_bytes=name_bytes, metadata=metadata, job=identity)
    return ShardedWriter(output, files, names=names, name_bytes=name_bytes, metadata=metadata, job=identity)


def _corrections(
    conversion: Conversion, output: Path, means: Means, identity: Any, stack: ExitStack
) -> SafetensorsWriter | None:
    """The writer of the error-correction LoRA, None where none is wanted."""
    if not means.error_lora_rank:
        return None
    path = error_lora.path_beside(output)
    names, name_bytes = error_lora.name_room(job.place for job in conversion.jobs if job.target)
    return _writer(stack, path, names, name_bytes, error_lora.metadata(output, means.error_lora_rank), identity)

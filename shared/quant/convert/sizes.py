"""How large a new file will be, and which files it is written into, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from shared.quant.convert.jobs import Conversion, Job, tensor_name
from shared.quant.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor


def output_files(conversion: Conversion, output: Path, layout: Layout, rank: int) -> dict[Path, list[str]]:
    """The files that convert() writes, each with what it holds: modules, then tensors that go along."""
    groups = {job.place.module: _most_bytes(job, rank) for job in conversion.jobs}
    groups |= {carried.name: carried.nbytes for carried in layout.carried}
    return layout.files(output, groups | dict.fromkeys(file_tensors(conversion), 0))


def expected_bytes(conversion: Conversion, metadata: Mapping[str, str], rank: int = 0) -> int:
    """The size of the new file, from shapes alone. rank: of SVDQuant's branches.

    Raises UserError for a format whose size is not known beforehand.
    """
    from shared.quant.safetensors_writer import header_bytes
    from shared.quant.sensitivity import bytes_of, plain_bytes

    gguf = any(job.target and job.target.gguf for job in conversion.jobs)
    total = 0
    for job in conversion.jobs:
        for suffix, shape in job.shapes.items():
            if suffix == "weight" and len(shape) == 2:
                total += bytes_of(job.format, job.target, shape[0], shape[1], rank)
            else:
                total += prod(shape) * (4 if gguf else plain_bytes(job.format))
    # GGUF's header is as long as what it holds; its names are the most of it.
    names, name_bytes = name_room(conversion)
    return total + (name_bytes if gguf else header_bytes(names, name_bytes, metadata))


def name_room(conversion: Conversion) -> tuple[int, int]:
    """The most tensors that the new file may hold, and the bytes of their names together."""
    names = [tensor_name(job.place.module, suffix) for job in conversion.jobs for suffix in _possible_suffixes(job)]
    return len(names), sum(len(name.encode()) for name in names)


def file_tensors(conversion: Conversion) -> dict[str, Tensor]:
    """What the formats want a file to hold once."""
    found: dict[str, Tensor] = {}
    for target in {job.format: job.target for job in conversion.jobs if job.target}.values():
        found |= target.file_tensors() if target.file_tensors else {}
    return found


def _most_bytes(job: Job, rank: int) -> int:
    """What a module's tensors may take in the new file; a little more than they do."""
    from shared.quant.sensitivity import plain_bytes

    target, shape = job.target, job.shapes.get("weight", ())
    if target is None or len(shape) != 2:
        return plain_bytes(job.format) * job.numbers
    rows, columns = shape
    vectors = 2 * (job.numbers - rows * columns)
    if target.ranked_bytes is not None:
        return vectors + target.ranked_bytes(rows, columns, rank)
    if target.bytes is not None:
        return vectors + target.bytes(rows, columns)
    return vectors + rows * columns + 8 * (rows + columns) + 256  # 8 bits, scales of rows, a marker


def _possible_suffixes(job: Job) -> set[str]:
    return {*job.shapes, *(job.target.suffixes if job.target else ())}

"""Convert a model's file into another format layer by layer: memory holds one layer, whatever the model's size.

    source layers --(dequantized where packed)--> rows of a new layer --Target.quantize--> its tensors --> writer
                                                        |                                      |
                                                        +----- relative error, read back <-----+

Each new layer is read back by the format's own reader before it is written, so a file that converts is one that loads,
and what the report says of a layer is what a program will compute with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shared.quant import gguf_file
from shared.quant.assemble import Part, Plan
from shared.quant.checkpoint import Checkpoint, TensorInfo
from shared.quant.errors import CheckpointError, RunError, UserError
from shared.quant.formats import Layer, format_of, layers_of
from shared.quant.recipe import KEPT, Recipe
from shared.quant.targets import PLAIN, Naming, Target

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ROWS_AT_ONCE = 1024  # compared together: a whole matrix in float32 twice would take most of a gigabyte


@dataclass(frozen=True)
class Place:
    """A module of the new file: our module's row blocks `blocks`, in that order, of `of` equal ones.

    official: what recipes call the rows.
    """

    module: str
    blocks: tuple[int, ...]
    of: int
    official: tuple[str, ...]


class Places(Protocol):
    def __call__(self, module: str, naming: Naming, *, packed: bool) -> tuple[Place, ...]:
        """Where a file of this naming keeps our module; packed: whether it will be."""


@dataclass(frozen=True)
class Model:
    """A model's file, and what its family says of it. shapes: our module -> suffix -> shape. config: for the header."""

    checkpoint: Checkpoint
    plan: Plan
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    config: Mapping[str, Any]
    places: Places


@dataclass(frozen=True)
class Job:
    """A module of the new file and how it is made. shapes: suffix -> shape; the suffix "" is a bare parameter."""

    place: Place
    parts: Sequence[Part]
    shapes: Mapping[str, tuple[int, ...]]
    format: str
    target: Target | None  # None: plain numbers

    @property
    def numbers(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class LayerReport:
    """How a matrix came out. relative_error: norm of what the format changed over the norm of the weight."""

    module: str
    format: str
    shape: tuple[int, ...]
    bytes: int
    relative_error: float


@dataclass(frozen=True)
class Conversion:
    """All modules of a new file, in its order, and which names it uses."""

    source: Path
    jobs: tuple[Job, ...]
    naming: Naming

    @property
    def numbers(self) -> int:
        return sum(job.numbers for job in self.jobs)

    @property
    def formats(self) -> dict[str, str]:
        """Packed module -> format."""
        return {job.place.module: job.format for job in self.jobs if job.target}

    @property
    def has_rank(self) -> bool:
        return any(job.target and job.target.has_rank for job in self.jobs)


# Numbers done, numbers in all, the module that comes next.
OnProgress = Callable[[int, int, str], None]


def plan_conversion(model: Model, recipe: Recipe, known: Mapping[str, Target], *, gguf: bool = False) -> Conversion:
    """Decide every module's format and name, from headers alone. gguf: whether the new file is one.

    Raises UserError naming the layer when formats cannot stand in one file, or its size does not suit its format.
    """
    matrices = {module for module, shapes in model.shapes.items() if len(shapes.get("weight", ())) == 2}
    naming = _naming(model, recipe, known, matrices, gguf)
    jobs: list[Job] = []
    for module, shapes in model.shapes.items():
        places = model.places(module, naming, packed=True)
        if all(_format_for(place, recipe) in PLAIN for place in places):
            places = model.places(module, naming, packed=False)
        for place in places:
            chosen = _format_for(place, recipe)
            if module not in matrices and chosen not in PLAIN:
                chosen = KEPT
            of_place = {s: (shape[0] * len(place.blocks) // place.of, *shape[1:]) for s, shape in shapes.items()}
            jobs.append(Job(place, model.plan[module], of_place, chosen, known.get(chosen)))
    for job in jobs:
        _check_size(job)
    return Conversion(model.checkpoint.path, tuple(jobs), naming)


def convert(
    conversion: Conversion,
    output: Path,
    *,
    rank: int,
    metadata: Mapping[str, str],
    identity: Any,
    on_progress: OnProgress,
) -> list[LayerReport]:
    """Write a safetensors file and say how each matrix came out. One layer is in memory at a time.

    identity: JSON-able; an unfinished file of the same identity is gone on with. Raises UserError naming the layer
    that cannot be converted, RunError when the disk refuses.
    """
    from shared.quant.safetensors_writer import SafetensorsWriter

    names = [_join(job.place.module, suffix) for job in conversion.jobs for suffix in _possible_suffixes(job)]
    name_bytes = sum(len(name.encode()) for name in names)
    done = 0
    with SafetensorsWriter(output, names=len(names), name_bytes=name_bytes, metadata=metadata, job=identity) as writer:
        for job in conversion.jobs:
            module = job.place.module
            on_progress(done, conversion.numbers, module)
            if module not in writer.finished:
                tensors, report = _converted(conversion.source, job, rank)
                named = {_join(module, suffix): tensor for suffix, tensor in tensors.items()}
                writer.add(module, named, asdict(report) if report else None)
            done += job.numbers
        writer.finish()
    notes = [writer.finished[job.place.module] for job in conversion.jobs]
    return [LayerReport(**note | {"shape": tuple(note["shape"])}) for note in notes if note]


def convert_to_gguf(
    conversion: Conversion, output: Path, *, metadata: Mapping[str, str], on_progress: OnProgress
) -> list[LayerReport]:
    """As convert(), into a GGUF file. An interrupted one leaves nothing, and starts from the beginning."""
    sources: dict[str, gguf_file.Source] = {}
    reports: list[LayerReport] = []
    done = 0

    def source_of(job: Job, suffix: str, before: int) -> gguf_file.Source:
        shape = job.shapes[suffix]
        is_matrix = suffix == "weight" and len(shape) == 2
        # Other programs want small tensors, and the pad tokens (1, dim), in float32.
        plain = PLAIN.get(job.format, PLAIN[KEPT]) if is_matrix else "F32"

        def load() -> Tensor:
            if not is_matrix:
                return _as_plain(conversion.source, job, suffix, plain)
            on_progress(before, conversion.numbers, job.place.module)
            tensors, report = _converted(conversion.source, job, 0)
            if report:
                reports.append(report)
            return tensors[suffix]

        packed = job.target.gguf if job.target and is_matrix else ""
        return gguf_file.Source(f"{gguf_file.PREFIX}{packed}" if packed else plain, shape, load)

    for job in conversion.jobs:
        sources |= {_join(job.place.module, suffix): source_of(job, suffix, done) for suffix in job.shapes}
        done += job.numbers
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        gguf_file.write(output, sources, metadata=metadata)
    except OSError as error:
        raise RunError(
            f"{output} could not be written: {error.strerror or error}.",
            "Look at the free space and the permissions there.",
        ) from error
    return reports


def _naming(model: Model, recipe: Recipe, known: Mapping[str, Target], matrices: Collection[str], gguf: bool) -> Naming:
    """Which names the new file uses: those that all formats in it call for."""
    asked = {_format_for(p, recipe) for module in matrices for p in model.places(module, "official", packed=True)}
    asked -= set(PLAIN)
    # One file holds SVDQ of one kind: nunchaku takes the kind from the GPU.
    groups = {(known[name].naming, name if known[name].has_rank else "") for name in asked}
    if len(groups) > 1 or any(bool(known[name].gguf) != gguf for name in asked):
        container = "a GGUF file" if gguf else "a safetensors file"
        raise UserError(
            f"{recipe.path}: {' and '.join(sorted(asked))} cannot be written into {container} like this.",
            "GGUF types go into a file named .gguf, all others into .safetensors; int8 and SVDQ stand alone.",
        )
    return next((known[name].naming for name in asked), "official")


def _format_for(place: Place, recipe: Recipe) -> str:
    said = {name: recipe.format_of(name) for name in place.official}
    if len(set(said.values())) > 1:
        words = ", ".join(f"{name} in {chosen}" for name, chosen in said.items())
        raise UserError(
            f"{recipe.path}: {place.module} is one matrix in this kind of file, but it asks for {words}.",
            "Give both one format.",
        )
    return said[place.official[0]]


def _check_size(job: Job) -> None:
    if job.target is None:
        return
    rows, columns = job.shapes["weight"]
    if rows % job.target.rows or columns % job.target.columns:
        needs = f"rows in multiples of {job.target.rows} and columns of {job.target.columns}"
        names = " ".join(f"--keep '{re.escape(name)}'" for name in job.place.official)
        raise UserError(
            f"{job.place.module} is {rows} x {columns}, but {job.format} needs {needs}.", f"Keep it plain: {names}."
        )


def _possible_suffixes(job: Job) -> set[str]:
    return {*job.shapes, *(job.target.suffixes if job.target else ())}


def _converted(source: Path, job: Job, rank: int) -> tuple[dict[str, Tensor], LayerReport | None]:
    """A module's tensors by suffix, and how its matrix came out; None without one."""
    plain = PLAIN.get(job.format, PLAIN[KEPT])
    tensors: dict[str, Tensor] = {}
    report = None
    for suffix, shape in job.shapes.items():
        if suffix != "weight" or len(shape) != 2:
            tensors[suffix] = _as_plain(source, job, suffix, plain)
            continue
        weight = _rows(job, suffix)
        try:
            if job.target is None:
                made = {suffix: _as_plain(source, job, suffix, plain)}
            else:
                made = job.target.quantize(weight, len(job.place.blocks), rank)
        except (UserError, ValueError) as error:
            hint = error.hint if isinstance(error, UserError) else ""
            raise UserError(f"{source}: {job.place.module} cannot become {job.format}: {error}", hint) from error
        nbytes = sum(t.numel() * t.element_size() for t in made.values())
        report = LayerReport(job.place.module, job.format, shape, nbytes, _relative_error(weight, made, job))
        tensors |= made
    return tensors, report


def _rows(job: Job, suffix: str) -> Tensor:
    """The job's rows of one parameter, in the place's order; float32 where the source is packed."""
    import torch

    found: dict[int, Tensor] = {}
    for part in job.parts:
        if not set(part.blocks) & set(job.place.blocks):
            continue
        packed = format_of(part.layer) if suffix == "weight" else None
        whole = packed.read(part.layer).dequantize(torch.float32) if packed else part.layer.load(suffix)[0]
        found |= dict(zip(part.blocks, whole.chunk(len(part.blocks)), strict=True))
    rows = [found[block] for block in job.place.blocks]
    joined = rows[0] if len(rows) == 1 else torch.cat(rows)
    return joined.reshape(job.shapes[suffix])


def _as_plain(source: Path, job: Job, suffix: str, dtype: str) -> Tensor:
    """A parameter as numbers. Raises CheckpointError for NaN, infinity and what the type cannot hold."""
    import torch

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    plain = _rows(job, suffix).to(types[dtype]).contiguous()
    if not plain.isfinite().all():
        raise CheckpointError(
            f"{source}: {_join(job.place.module, suffix)} holds numbers that are not finite, or too large for {dtype}.",
            "Download the file again." if dtype != "F16" else "Take bf16 if the file itself is sound.",
        )
    return plain


def _relative_error(weight: Tensor, made: Mapping[str, Tensor], job: Job) -> float:
    """What the format's own reader makes of the tensors, against the weight."""
    layer = _layer_of(made, job)
    reader = format_of(layer)
    packed = reader.read(layer) if reader else None
    changed = whole = 0.0
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(weight))
        wanted = weight[start:stop].float()
        if packed:
            found = packed.take_rows(start, stop).dequantize(wanted.dtype)
        else:
            found = made["weight"][start:stop].float()
        changed += float((found - wanted).square().sum(dtype=_double()))
        whole += float(wanted.square().sum(dtype=_double()))
    return float((changed / whole) ** 0.5) if whole else 0.0


@dataclass(frozen=True)
class _InMemory(Checkpoint):
    """Tensors that are on their way to a file, as their format's reader wants to see them."""

    data: Mapping[str, Tensor]

    def load(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        return {name: self.data[name] for name in (self.data if names is None else names)}

    def read_bytes(self, name: str) -> bytes:
        return bytes(self.data[name].tolist())


def _layer_of(made: Mapping[str, Tensor], job: Job) -> Layer:
    from shared.quant.safetensors_writer import dtype_name

    module = job.place.module
    path = Path(module)
    infos: dict[str, TensorInfo] = {}
    for suffix, tensor in made.items():
        dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
        if job.target and job.target.gguf:
            dtype, shape = f"{gguf_file.PREFIX}{job.target.gguf}", job.shapes[suffix]
        name = _join(module, suffix)
        infos[name] = TensorInfo(name, dtype, shape, tensor.numel() * tensor.element_size(), path, 0)
    data = {_join(module, suffix): tensor for suffix, tensor in made.items()}
    checkpoint = _InMemory(path, (path,), infos, {}, data)
    return layers_of(checkpoint, infos)[module]


def _double() -> torch.dtype:
    import torch

    return torch.float64


def _join(module: str, suffix: str) -> str:
    return f"{module}.{suffix}" if suffix else module

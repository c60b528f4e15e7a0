"""Convert a model's file into another format layer by layer: memory holds one layer, whatever the model's size.

    source layers --(dequantized where packed)--> rows of a new layer --Target.quantize--> its tensors --> writer
                                                        |                                      |
                                                        +----- relative error, read back <-----+

Each new layer is read back by the format's own reader before it is written, so a file that converts is one that loads,
and what the report says of a layer is what a program will compute with. LoRAs to be merged are added to the source's
rows in float32; an error-correction LoRA (error_lora.py) is written in step with the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from shared.quant import error_lora, gguf_file
from shared.quant.assemble import Part, Plan
from shared.quant.checkpoint import Checkpoint, TensorInfo
from shared.quant.errors import CheckpointError, RunError, UserError
from shared.quant.formats import Layer, format_of, layers_of
from shared.quant.layout import Layout
from shared.quant.recipe import KEPT, Recipe
from shared.quant.targets import PLAIN, Naming, Target

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.quant.inputs import Inputs
    from shared.quant.layout import ShardedWriter
    from shared.quant.safetensors_writer import SafetensorsWriter

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


class Merge(Protocol):
    """A LoRA that is to become part of the weights."""

    @property
    def modules(self) -> Collection[str]:
        """Ours, whose parameters it changes."""

    def delta(self, module: str, suffix: str, base: Callable[[], Tensor]) -> Tensor | None:
        """What it adds to one of our parameters, float32, whole; None for nothing. base: the module's weight."""


@dataclass(frozen=True)
class Model:
    """A model's file, and what its family says of it. shapes: our module -> suffix -> shape. config: for the header.

    merges: added to the weights on the way.
    """

    checkpoint: Checkpoint
    plan: Plan
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    config: Mapping[str, Any]
    places: Places
    merges: Sequence[Merge] = ()


@dataclass(frozen=True)
class Job:
    """A module of the new file and how it is made. shapes: suffix -> shape; the suffix "" is a bare parameter.

    source: our module whose rows it holds.
    """

    source: str
    place: Place
    parts: Sequence[Part]
    shapes: Mapping[str, tuple[int, ...]]
    format: str
    target: Target | None  # None: plain numbers
    merges: Sequence[Merge] = ()

    @property
    def numbers(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class LayerReport:
    """How a matrix came out. relative_error: norm of what the format changed over the norm of the weight.

    output_error: the same of its outputs, for inputs it was seen to take; None without calibration.
    corrected_error, corrected_output_error: both with the error-correction LoRA; None without.
    """

    module: str
    format: str
    shape: tuple[int, ...]
    bytes: int
    relative_error: float
    output_error: float | None = None
    corrected_error: float | None = None
    corrected_output_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Means:
    """How matrices are packed, besides their formats.

    rank: of SVDQ's branch. inputs: what one of our modules was seen to take, None where nothing is known.
    learned_rounding: see rounding.py; for formats that offer it. error_lora_rank: 0 for none.
    """

    rank: int
    inputs: Callable[[str], Inputs | None] = lambda _module: None
    learned_rounding: bool = False
    error_lora_rank: int = 0


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


def plan_conversion(
    model: Model, recipe: Recipe, known: Mapping[str, Target], *, gguf: bool = False, diffusers: bool = False
) -> Conversion:
    """Decide every module's format and name, from headers alone. gguf: whether the new file is one.

    diffusers: whether it has to have diffusers' names, which plain numbers can have.
    Raises UserError naming the layer when formats cannot stand in one file, or its size does not suit its format.
    """
    matrices = {module for module, shapes in model.shapes.items() if len(shapes.get("weight", ())) == 2}
    naming = _naming(model, recipe, known, matrices, gguf)
    if diffusers and naming == "official":
        naming = "diffusers"
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
            merges = [merge for merge in model.merges if module in merge.modules]
            jobs.append(Job(module, place, model.plan[module], of_place, chosen, known.get(chosen), merges))
    for job in jobs:
        _check_size(job)
    if diffusers and (packed := sorted({job.format for job in jobs if job.target})):
        raise UserError(
            f"{recipe.path}: diffusers reads no {' and no '.join(packed)} from a folder.", "Take bf16, fp16 or fp32."
        )
    return Conversion(model.checkpoint.path, tuple(jobs), naming)


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
                tensors, report, pair = _converted(conversion.source, job, means)
                if corrections is not None and not corrected:
                    corrections.add(module, pair)
                if module not in writer.finished:
                    named = {f"{layout.prefix}{_join(module, suffix)}": tensor for suffix, tensor in tensors.items()}
                    writer.add(module, named, asdict(report) if report else None)
            done += job.numbers
        for carried in (c for c in layout.carried if c.name not in writer.finished):
            on_progress(done, conversion.numbers, carried.name)
            writer.add(carried.name, {carried.name: carried.load()})
        for name, tensor in _file_tensors(conversion).items():
            if name not in writer.finished:
                writer.add(name, {f"{layout.prefix}{name}": tensor})
        if corrections is not None:
            corrections.finish()
        writer.finish()
    notes = [writer.finished[job.place.module] for job in conversion.jobs]
    return [LayerReport(**note | {"shape": tuple(note["shape"])}) for note in notes if note]


def output_files(conversion: Conversion, output: Path, layout: Layout, rank: int) -> dict[Path, list[str]]:
    """The files that convert() writes, each with what it holds: modules, then tensors that go along."""
    groups = {job.place.module: _most_bytes(job, rank) for job in conversion.jobs}
    groups |= {carried.name: carried.nbytes for carried in layout.carried}
    return layout.files(output, groups | dict.fromkeys(_file_tensors(conversion), 0))


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
        listing |= {_join(job.place.module, suffix): (_gguf_type(job, suffix), s) for suffix, s in job.shapes.items()}
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
                left = [suffix for suffix in job.shapes if _join(module, suffix) not in writer.finished]
                if left or not corrected:
                    tensors, report, pair = _converted_for_gguf(conversion.source, job, means)
                    if corrections is not None and not corrected:
                        corrections.add(module, pair)
                    for suffix in left:
                        note = asdict(report) if report and suffix == "weight" else None
                        writer.add(_join(module, suffix), tensors[suffix], note)
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


def _converted_for_gguf(
    source: Path, job: Job, means: Means
) -> tuple[dict[str, Tensor], LayerReport | None, dict[str, Tensor]]:
    """_converted() with the types of a GGUF file."""
    matrix = {suffix: shape for suffix, shape in job.shapes.items() if suffix == "weight" and len(shape) == 2}
    tensors, report, pair = _converted(source, replace(job, shapes=matrix), means)
    others = {suffix: _as_plain(source, job, suffix, "F32") for suffix in job.shapes if suffix not in matrix}
    return tensors | others, report, pair


def name_room(conversion: Conversion) -> tuple[int, int]:
    """The most tensors that the new file may hold, and the bytes of their names together."""
    names = [_join(job.place.module, suffix) for job in conversion.jobs for suffix in _possible_suffixes(job)]
    return len(names), sum(len(name.encode()) for name in names)


def sampled(job: Job, formats: Mapping[str, Target | None], means: Means, rows: int) -> tuple[Tensor, dict[str, float]]:
    """About `rows` rows of a job's weight, float32, and the relative error of each format (None: plain) on them.

    Of the outputs where inputs are known, else of the weight. Formats with a rank are tried on all rows.
    """
    whole = _rows(job, "weight")
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
        of_weight, of_outputs = _errors(tried, made, replace(shown, format=name, target=target), inputs)
        errors[name] = of_weight if of_outputs is None else of_outputs
    return weight, errors


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
    further = [carried.name for carried in layout.carried] + list(_file_tensors(conversion))
    names, name_bytes = names + len(further), name_bytes + sum(len(name.encode()) for name in further)
    name_bytes += names * len(layout.prefix.encode())
    files = output_files(conversion, output, layout, means.rank)
    if len(files) == 1:
        return SafetensorsWriter(output, names=names, name_bytes=name_bytes, metadata=metadata, job=identity)
    return ShardedWriter(output, files, names=names, name_bytes=name_bytes, metadata=metadata, job=identity)


def _file_tensors(conversion: Conversion) -> dict[str, Tensor]:
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


def _corrections(
    conversion: Conversion, output: Path, means: Means, identity: Any, stack: ExitStack
) -> SafetensorsWriter | None:
    """The writer of the error-correction LoRA, None where none is wanted."""
    if not means.error_lora_rank:
        return None
    path = error_lora.path_beside(output)
    names, name_bytes = error_lora.name_room(job.place for job in conversion.jobs if job.target)
    return _writer(stack, path, names, name_bytes, error_lora.metadata(output, means.error_lora_rank), identity)


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


def _converted(source: Path, job: Job, means: Means) -> tuple[dict[str, Tensor], LayerReport | None, dict[str, Tensor]]:
    """A module's tensors by suffix, how its matrix came out (None without one), and its error-correction LoRA."""
    plain = PLAIN.get(job.format, PLAIN[KEPT])
    tensors: dict[str, Tensor] = {}
    report = None
    pair: dict[str, Tensor] = {}
    for suffix, shape in job.shapes.items():
        if suffix != "weight" or len(shape) != 2:
            tensors[suffix] = _as_plain(source, job, suffix, plain)
            continue
        weight = _rows(job, suffix)
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
        errors = _errors(weight, made, job, inputs)
        corrected: tuple[float | None, float | None] = (None, None)
        if means.error_lora_rank and job.target:
            up, down = error_lora.correction(_missing(weight, made, job), means.error_lora_rank, inputs)
            pair = error_lora.tensors_of(job.place, up, down)
            corrected = _errors(weight, made, job, inputs, (up, down))
        report = LayerReport(job.place.module, job.format, shape, nbytes, *errors, *corrected)
        tensors |= made
    return tensors, report, pair


def _rows(job: Job, suffix: str) -> Tensor:
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
        whole = packed.read(part.layer).dequantize(torch.float32) if packed else part.layer.load(suffix)[0]
        found |= dict(zip(part.blocks, whole.chunk(len(part.blocks)), strict=True))
    rows = [found[block] for block in blocks]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


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


def _errors(
    weight: Tensor,
    made: Mapping[str, Tensor],
    job: Job,
    inputs: Inputs | None,
    pair: tuple[Tensor, Tensor] | None = None,
) -> tuple[float, float | None]:
    """Relative errors of the weight and of its outputs (None without inputs), with a correcting pair if given."""
    changed = whole = outputs_changed = outputs = 0.0
    rows = None if inputs is None else inputs.judging
    for start, wanted, found in _read_back(weight, made, job):
        if pair is not None:
            found = found.addmm(pair[0][start : start + len(found)], pair[1])
        found -= wanted
        changed += float(found.square().sum(dtype=_double()))
        whole += float(wanted.square().sum(dtype=_double()))
        if rows is not None:
            outputs_changed += float((rows @ found.t()).square().sum(dtype=_double()))
            outputs += float((rows @ wanted.t()).square().sum(dtype=_double()))
    of_outputs = None if rows is None else _relative(outputs_changed, outputs)
    return _relative(changed, whole), of_outputs


def _missing(weight: Tensor, made: Mapping[str, Tensor], job: Job) -> Tensor:
    """(N, K) float32: what the format took from the weight."""
    import torch

    return torch.cat([wanted - found for _, wanted, found in _read_back(weight, made, job)])


def _read_back(weight: Tensor, made: Mapping[str, Tensor], job: Job) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row, rows of the weight, and what the format's own reader makes of the tensors; float32, new memory."""
    layer = _layer_of(made, job)
    reader = format_of(layer)
    packed = reader.read(layer) if reader else None
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(weight))
        wanted = weight[start:stop].float()
        if packed:
            yield start, wanted, packed.take_rows(start, stop).dequantize(wanted.dtype)
        else:
            yield start, wanted, made["weight"][start:stop].to(wanted.dtype, copy=True)


def _relative(changed: float, whole: float) -> float:
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

"""`quantize`: convert a transformer's or a ControlNet's file into another format, report on it, make it a preset."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.inspection import describe_checkpoint
from shared.app.loras import match_words
from shared.app.memory import peak_rss_mb
from shared.app.metadata import write_file
from shared.app.schema import read_json_object
from shared.quant.checkpoint import INDEX_SUFFIX, Checkpoint
from shared.quant.error_lora import find_beside, path_beside
from shared.quant.errors import UserError
from shared.quant.formats import format_of
from shared.quant.recipe import KEPT, Recipe, Rule
from shared.quant.sensitivity import AUTO, GGUF_FORMATS, SAFETENSORS_FORMATS, SVDQ_FORMATS

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.presets import Preset
    from shared.quant.convert import Conversion, LayerReport, Means, Model, OnProgress
    from shared.quant.inputs import Inputs
    from shared.quant.layout import Layout
    from shared.quant.sensitivity import Candidate, Sensitivity
    from shared.quant.targets import Target

FINETUNES = "finetunes"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
WORST = 10
CONTROL = "control"
_KINDS = ("transformer", "checkpoint", CONTROL)
_NO_CALIBRATION = (
    "SVDQuant without calibration: no activations were looked at, so nothing is smoothed; "
    "the low-rank branch makes up for the weights' rounding only."
)


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """What the command line asks for. recipe: a name or a file. keep: patterns of layers that stay as they are.

    rank: None for the default. like: id of the preset whose settings the new one takes, "" to find it by the file.
    merge_loras: files and strengths, added to the weights first. error_lora_rank: of the error-correction LoRA that is
    written beside the output; 0 for none. calibrate: pictures that are drawn first, to see what layers are fed with.
    prompts: for them; none for the family's own. learned_rounding: see shared/quant/rounding.py. target_size: bytes of
    the new file, for recipes that say "auto"; 0 for none. shard_size: bytes of a file, 0 for one file of any size.
    diffusers: the output is a folder as diffusers has it. text_encoder, vae: files that go into the output too.
    """

    source: Path
    output: Path
    recipe: str
    rank: int | None = None
    keep: Sequence[str] = ()
    like: str = ""
    with_preset: bool = True
    overwrite: bool = False
    merge_loras: Sequence[tuple[Path, float]] = ()
    error_lora_rank: int = 0
    calibrate: int = 0
    prompts: Sequence[str] = ()
    learned_rounding: bool = False
    target_size: int = 0
    shard_size: int = 0
    diffusers: bool = False
    text_encoder: Path | None = None
    vae: Path | None = None

    @property
    def file(self) -> Path:
        """The weights file that is written; with shards, what their names begin with."""
        return self.output / DIFFUSERS_FILE if self.diffusers else self.output

    @property
    def is_gguf(self) -> bool:
        return self.file.suffix.lower() == ".gguf"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Why a layer got its format: what was measured of it, and the error that each format tried would have had."""

    layer: str
    format: str
    kurtosis: float
    peak: float
    errors: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What was written. layers: every matrix, in the file's order. preset: its id, "" when none was made.

    error_lora: the error-correction LoRA's file, None without one. chosen: what the recipe left open, and why.
    expected_bytes: the size that the choice was made for, None without one. output: what to open; an index where there
    are several files.
    """

    output: Path
    report: Path
    bytes: int
    seconds: float
    peak_rss_mb: float | None
    layers: Sequence[LayerReport]
    notes: Sequence[str]
    preset: str
    error_lora: Path | None = None
    chosen: Sequence[Chosen] = ()
    expected_bytes: int | None = None

    @property
    def quantized(self) -> list[LayerReport]:
        """The matrices that were not left plain, the least exact first."""
        from shared.quant.targets import PLAIN

        return sorted((r for r in self.layers if r.format not in PLAIN), key=lambda r: -r.relative_error)

    def as_dict(self) -> dict[str, Any]:
        quantized = self.quantized
        return {
            "output": str(self.output),
            "bytes": self.bytes,
            "layers": dict(Counter(r.format for r in self.layers)),
            "seconds": round(self.seconds, 1),
            "peak_rss_mb": None if self.peak_rss_mb is None else round(self.peak_rss_mb),
            "worst": [asdict(r) for r in quantized[:WORST]],
            "mean_relative_error": _mean(r.relative_error for r in quantized) or 0.0,
            "mean_output_error": _mean(r.output_error for r in quantized),
            "mean_corrected_error": _mean(r.corrected_error for r in quantized),
            "mean_corrected_output_error": _mean(r.corrected_output_error for r in quantized),
            "expected_bytes": self.expected_bytes,
            "error_lora": None if self.error_lora is None else str(self.error_lora),
            "report": str(self.report),
            "preset": self.preset,
            "notes": list(self.notes),
        }


def quantize(ctx: AppContext, request: QuantizeRequest, on_progress: OnProgress) -> QuantizeResult:
    """Convert, then write OUT.report.json and the preset. Raises UserError before anything is written where it can."""
    from shared.quant.convert import Means, convert, convert_to_gguf, expected_bytes, output_files, plan_conversion
    from shared.quant.layout import opened
    from shared.quant.targets import DEFAULT_RANK, PLAIN, targets

    started = time.monotonic()
    _check_paths(request)
    _check_lora_paths(request)
    family, kind = _family_of(ctx, request.source)
    if kind == CONTROL:
        _check_control(request)
    like = _preset_like(ctx, request, kind) if request.with_preset else None
    known = targets()
    recipe = _recipe(request, family.RECIPES, [*known, *PLAIN, AUTO])
    is_auto = any(rule.format == AUTO for rule in recipe.rules)
    _check_numbers(request, is_auto)
    model = family.open_model(request.source)
    model, notes = _merged(family, model, request)
    is_gguf = request.is_gguf
    conversion = plan_conversion(model, _opened(recipe, is_gguf), known, gguf=is_gguf, diffusers=request.diffusers)
    _check_keep(request, conversion)
    _check_flags(request, conversion, is_auto)
    layout = _layout(request, family)
    rank = request.rank or DEFAULT_RANK
    means = Means(rank=rank, learned_rounding=request.learned_rounding, error_lora_rank=request.error_lora_rank)
    prompts = tuple(request.prompts or family.calibration_prompts(model.config)) if request.calibrate else ()
    if request.calibrate:
        means = replace(means, inputs=_calibrated(ctx, request, prompts, conversion, on_progress))
    chosen: list[Chosen] = []
    if is_auto:
        choosing = _Choosing(request, recipe, family, model, known, means, on_progress)
        recipe, chosen, conversion = choosing.best()
    naming = "official" if is_gguf else conversion.naming
    metadata = family.header(naming, conversion.formats, model.config, rank)
    metadata = {"format": "pt"} if request.diffusers else metadata
    files = [request.file]
    identity = {"source": _stamps(model.checkpoint.files), "rules": _rules(recipe), "rank": rank}
    identity |= {"error_lora": request.error_lora_rank}
    identity |= {"calibrated": [request.calibrate, *prompts], "learned_rounding": request.learned_rounding}
    identity |= {"merged": [[*_stamps([path]), strength] for path, strength in request.merge_loras]}
    identity |= {"carried": [[c.name, *_stamps(c.checkpoint.files)] for c in layout.carried]}
    if is_gguf:
        layers = convert_to_gguf(
            conversion,
            request.output,
            metadata={"config": metadata["config"]},
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
        _write_json(request.output / "config.json", model.config)
    output = opened(request.file, files)
    result = QuantizeResult(
        output=output,
        report=request.output.with_name(f"{request.output.name}.report.json"),
        bytes=sum(file.stat().st_size for file in files),
        seconds=time.monotonic() - started,
        peak_rss_mb=peak_rss_mb(),
        layers=layers,
        notes=(*notes, *((_NO_CALIBRATION,) if conversion.has_rank and not request.calibrate else ())),
        preset=_register(ctx, like, request, recipe, kind, output) if like else "",
        error_lora=path_beside(request.output) if request.error_lora_rank else None,
        chosen=chosen,
        expected_bytes=expected_bytes(conversion, metadata, rank) if is_auto else None,
    )
    said: dict[str, Any] = {"source": str(request.source), "recipe": str(recipe.path)}
    said["rank"] = rank if conversion.has_rank else None
    said |= {"calibration": {"pictures": request.calibrate, "prompts": list(prompts)} if request.calibrate else None}
    everything = {"every_layer": [asdict(r) for r in layers], "chosen": [asdict(c) for c in chosen]}
    _write_json(result.report, said | result.as_dict() | everything)
    if is_auto:
        _write_json(_recipe_path(request.output), {"description": recipe.description, "rules": _rules(recipe)})
    return result


def recipe_names(root: Path) -> list[str]:
    """Recipes that come with the program and ask for no size, by the name that --format and --recipe take."""
    return sorted({path.stem for path in (root / "models").glob("*/recipes/*.json")} - {AUTO})


def _check_paths(request: QuantizeRequest) -> None:
    output, suffixes = request.output, (".safetensors", ".sft", ".gguf")
    if request.diffusers and output.suffix.lower() in suffixes:
        raise UserError(f"--output {output}: with --diffusers it is a folder.", "Give a name without an ending.")
    if not request.diffusers and output.suffix.lower() not in suffixes:
        raise UserError(
            f"--output {output}: a name that ends in .safetensors or .gguf is needed.",
            "With --diffusers it is the name of a folder.",
        )
    output = request.file
    index = output.with_name(f"{output.stem}{INDEX_SUFFIX}")
    if not (output.exists() or index.exists()):
        return
    if output.is_dir() or (output.exists() and request.source.exists() and output.samefile(request.source)):
        raise UserError(f"--output {output} is a folder, or the file to be converted.", "Choose another name.")
    if not request.overwrite:
        raise UserError(f"{output} is there already.", "Choose another name, or add --overwrite.")


def _check_lora_paths(request: QuantizeRequest) -> None:
    for path, _ in request.merge_loras:
        if not path.is_file():
            raise UserError(f"--merge-lora {path}: there is no such file.", "Check the path.")
    beside = path_beside(request.output)
    if not request.error_lora_rank:
        if find_beside(request.output) is not None and request.overwrite:
            raise UserError(
                f"{beside} corrects the errors of the file that is to be replaced, and would spoil the new one.",
                "Delete it, or write a new one with --error-lora.",
            )
    elif beside.exists() and not request.overwrite:
        raise UserError(f"{beside} is there already.", "Choose another name, or add --overwrite.")


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


def _check_control(request: QuantizeRequest) -> None:
    """Whether nothing is asked that takes a transformer."""
    flags = {
        "--merge-lora": bool(request.merge_loras),
        "--error-lora": bool(request.error_lora_rank),
        "--calibrate": bool(request.calibrate),
    }
    for flag in (flag for flag, is_given in flags.items() if is_given):
        raise UserError(f"{flag} is for transformers, and {request.source.name} is a ControlNet.", "Leave it out.")


def _check_numbers(request: QuantizeRequest, is_auto: bool) -> None:
    if request.calibrate < 0:
        raise UserError(f"--calibrate {request.calibrate}: a number of pictures, 8 for example.")
    if request.learned_rounding and not request.calibrate:
        raise UserError("--learned-rounding learns from what layers are fed with.", "Add --calibrate 8.")
    if request.prompts and not request.calibrate:
        raise UserError("--prompts are for the pictures of --calibrate.", "Add --calibrate 8.")
    if is_auto != bool(request.target_size):
        raise UserError(
            f"{request.recipe} leaves formats open, which takes a size." if is_auto
            else f"{request.recipe} leaves no format open, so there is nothing to do for a --target-size.",
            "Add --target-size 4.8GB, for example." if is_auto else "Leave it out, or use --recipe auto.",
        )  # fmt: skip


def _check_flags(request: QuantizeRequest, conversion: Conversion, is_auto: bool) -> None:
    """Whether the formats have what the flags are about. is_auto: formats are still to be chosen, SVDQ may be one."""
    if request.rank is not None and not ((conversion.has_rank or is_auto) and request.rank > 0):
        raise UserError(f"--rank {request.rank}: a positive number, for SVDQ formats only.", "Leave it out.")
    if request.learned_rounding and not any(job.target and job.target.has_learned_rounding for job in conversion.jobs):
        raise UserError("--learned-rounding: none of the formats here offers it; SVDQ formats do.", "Leave it out.")
    if request.error_lora_rank < 0:
        raise UserError(f"--error-lora {request.error_lora_rank}: a positive rank, 32 for example.")
    if request.error_lora_rank and not conversion.formats:
        raise UserError("--error-lora: no layer is packed, so there is no error to correct.", "Leave it out.")
    laid_out = {
        "--shard-size": bool(request.shard_size),
        "--diffusers": request.diffusers,
        "--text-encoder": request.text_encoder is not None,
        "--vae": request.vae is not None,
    }
    asked = [flag for flag, is_given in laid_out.items() if is_given]
    if asked and request.is_gguf:
        raise UserError(f"{asked[0]}: a GGUF file is one file and holds one model.", "Leave it out.")
    if asked and request.error_lora_rank:
        raise UserError(f"{asked[0]}: an error-correction LoRA stands beside a file of one model.", "Leave one out.")
    parts = [flag for flag in asked if flag in ("--text-encoder", "--vae")]
    if parts and (request.diffusers or conversion.naming != "official"):
        raise UserError(
            f"{parts[0]} makes a ComfyUI checkpoint, which has ComfyUI's names; "
            f"{'--diffusers' if request.diffusers else request.recipe} has others.",
            "Leave it out, or take bf16, fp16, fp32, fp8_scaled, mxfp8, nvfp4 or int8_comfy.",
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


def _opened(recipe: Recipe, is_gguf: bool) -> Recipe:
    """The recipe with the smallest format wherever it says "auto": for its names and for what it will not accept."""
    smallest = (GGUF_FORMATS if is_gguf else SAFETENSORS_FORMATS)[0]
    rules = tuple(replace(rule, format=smallest) if rule.format == AUTO else rule for rule in recipe.rules)
    return replace(recipe, rules=rules)


def _calibrated(
    ctx: AppContext, request: QuantizeRequest, prompts: Sequence[str], conversion: Conversion, on_progress: OnProgress
) -> Callable[[str], Inputs | None]:
    """What our modules were seen to take while the model drew."""
    from shared.app.calibration import Drawings, watch

    drawings = Drawings(
        source=request.source,
        like=_plain_or_like(ctx, request),
        prompts=prompts,
        count=request.calibrate,
        loras=request.merge_loras,
    )
    return watch(ctx, drawings, lambda words: on_progress(0, conversion.numbers, words)).inputs


@dataclass(frozen=True)
class _Choosing:
    """Finds a format for each layer that a recipe leaves open."""

    request: QuantizeRequest
    recipe: Recipe
    family: Any
    model: Model
    known: Mapping[str, Target]
    means: Means
    on_progress: OnProgress

    def best(self) -> tuple[Recipe, list[Chosen], Conversion]:
        """The recipe whose layers have the least errors, why each is so, and the conversion by it.

        Raises UserError naming the smallest size that is possible, where it is more than the one asked for.
        """
        is_gguf = self.request.is_gguf
        formats = GGUF_FORMATS if is_gguf else SAFETENSORS_FORMATS
        choices = [self._among(formats, _opened(self.recipe, is_gguf))]
        if not is_gguf and (not choices[0].fits or any(c.format == formats[0] for c in choices[0].found.values())):
            choices += [choice for kind in SVDQ_FORMATS if (choice := self._in_svdq(kind)) is not None]
        fitting = [choice for choice in choices if choice.fits]
        if not fitting:
            smallest = min(choice.smallest for choice in choices)
            raise UserError(
                f"--target-size: {self._size} is too small; the smallest file of this recipe takes "
                f"{smallest / 1e6:,.1f} MB.",
                "Allow that much, or write a recipe that packs more layers.",
            )
        chosen = min(fitting, key=lambda choice: choice.error)
        rules = [Rule(re.compile(re.escape(name)), format) for name, format in chosen.formats.items()]
        has_rank = any(format in SVDQ_FORMATS for format in chosen.formats.values())
        asked = f"{self._size}, --rank {self.means.rank}" if has_rank else self._size
        words = f"Chosen for {self.request.source.name} and {asked}. {self.recipe.description}"
        fixed = [rule for rule in self.recipe.rules if rule.format != AUTO]
        # First, since no other rule decided about these layers.
        recipe = replace(self.recipe, description=words, rules=(*rules, *fixed))
        return recipe, chosen.reasons, self._plan(recipe)

    def _plan(self, recipe: Recipe) -> Conversion:
        from shared.quant.convert import plan_conversion

        return plan_conversion(self.model, recipe, self.known, gguf=self.request.is_gguf)

    def _in_svdq(self, kind: str) -> _Choice | None:
        """What can be had in a file of SVDQ layers of one kind, and plain ones; None where the recipe forbids that."""
        from shared.quant.targets import PLAIN

        usual = Recipe.load(self.family.RECIPES / f"{kind}.json", [*self.known, *PLAIN])
        opened = self._plan(_opened(self.recipe, is_gguf=False))
        names = [name for job in opened.jobs for name in job.place.official if self._is_open(name)]
        packed = [name for name in names if usual.format_of(name) == kind]
        rules = [Rule(re.compile(re.escape(name)), kind if name in packed else KEPT) for name in names]
        fixed = [rule for rule in self.recipe.rules if rule.format != AUTO]
        try:
            return self._among((kind, KEPT), replace(self.recipe, rules=(*rules, *fixed)), only=packed)
        except UserError:
            return None  # other formats are fixed for other layers, or sizes do not divide

    @property
    def _size(self) -> str:
        return f"{self.request.target_size / 1e6:,.1f} MB"

    def _is_open(self, name: str) -> bool:
        return self.recipe.format_of(name) == AUTO

    def _among(self, names: Sequence[str], opened: Recipe, only: Sequence[str] | None = None) -> _Choice:
        """Choose among these formats. opened: the recipe with the smallest where it says "auto".

        only: of the open layers those that may be packed; None is all.
        """
        from shared.quant.convert import expected_bytes
        from shared.quant.sensitivity import choose, probe

        conversion = self._plan(opened)
        formats = {name: self.known.get(name) for name in names}
        layers = []
        for job in conversion.jobs:
            first = job.place.official[0]
            if job.target and self._is_open(first) and (only is None or first in only):
                self.on_progress(0, conversion.numbers, f"Trying {', '.join(names)} on {job.place.module}")
                layers.append(probe(job, formats, self.means))
        rank = self.means.rank if conversion.has_rank else None
        header = self.family.header(conversion.naming, {}, self.model.config, rank)
        # All that is not chosen for: the file with the smallest formats, without them.
        smallest = sum(min(c.bytes for c in layer.candidates) for layer in layers)
        rest = expected_bytes(conversion, header, self.means.rank) - smallest
        fits = rest + smallest <= self.request.target_size
        return _Choice(layers, choose(layers, self.request.target_size - rest) if fits else {}, rest + smallest, fits)


@dataclass(frozen=True)
class _Choice:
    """What was found for each layer among some formats; nothing where the size does not allow it."""

    layers: Sequence[Sensitivity]
    found: Mapping[str, Candidate]
    smallest: int  # bytes of the smallest file
    fits: bool

    @property
    def error(self) -> float:
        """Sum of squared errors; a matrix that stacks several counts as often."""
        return sum(len(layer.names) * self.found[layer.name].error ** 2 for layer in self.layers)

    @property
    def formats(self) -> dict[str, str]:
        """Format by the name that recipes have."""
        return {name: self.found[layer.name].format for layer in self.layers for name in layer.names}

    @property
    def reasons(self) -> list[Chosen]:
        return [
            Chosen(
                layer=layer.name,
                format=self.found[layer.name].format,
                kurtosis=layer.kurtosis,
                peak=layer.peak,
                errors={candidate.format: candidate.error for candidate in layer.candidates},
            )
            for layer in self.layers
        ]


def _recipe_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.recipe.json")


def _rules(recipe: Recipe) -> list[list[str]]:
    return [[rule.pattern.pattern, rule.format] for rule in recipe.rules]


def _recipe(request: QuantizeRequest, folder: Path, formats: Sequence[str]) -> Recipe:
    path = folder / f"{request.recipe}.json"
    if not path.is_file():
        path = Path(request.recipe)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise UserError(f"{request.recipe}: there is no such format, recipe or file.", f"Known are {names}.")
    recipe = Recipe.load(path, formats)
    kept: list[Rule] = []
    for pattern in request.keep:
        try:
            kept.append(Rule(re.compile(pattern), KEPT))
        except re.error as error:
            raise UserError(f"--keep {pattern}: no regular expression ({error}).") from error
    return replace(recipe, rules=(*kept, *recipe.rules))


def _layout(request: QuantizeRequest, family: Any) -> Layout:
    from shared.quant.layout import Layout

    if request.text_encoder is None and request.vae is None:
        return Layout(shard_bytes=request.shard_size)
    carried = family.companions(request.text_encoder, request.vae)
    return Layout(shard_bytes=request.shard_size, prefix=family.CHECKPOINT_PREFIX, carried=carried)


def _check_keep(request: QuantizeRequest, conversion: Conversion) -> None:
    names = [name for job in conversion.jobs for name in job.place.official]
    for pattern in request.keep:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise UserError(
                f"--keep {pattern} fits no layer's whole name; they look like {names[len(names) // 2]}.",
                r"Write layers\.0\..* for the first block, for example.",
            )


def _stamps(files: Sequence[Path]) -> list[list[Any]]:
    """What tells that files are still the same."""
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _mean(errors: Iterable[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return sum(known) / len(known) if known else None


def _preset_like(ctx: AppContext, request: QuantizeRequest, kind: str) -> Preset | None:
    """The preset named, else the one that uses the source file; None for a ControlNet that no preset uses."""
    return _plain_or_like(ctx, request) if kind != CONTROL or request.like else _user_of(ctx, request, kind)


def _plain_or_like(ctx: AppContext, request: QuantizeRequest) -> Preset:
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


def _register(ctx: AppContext, like: Preset, request: QuantizeRequest, recipe: Recipe, kind: str, output: Path) -> str:
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
    _write_json(folder / f"{preset_id}.json", merged)
    return preset_id


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=4, ensure_ascii=False) + "\n"
    write_file(path, lambda file: file.write(text.encode("utf-8")))

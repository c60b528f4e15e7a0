"""`quantize`: convert a transformer's file into another format, report on it, and make it a preset."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.inspection import describe_checkpoint
from shared.app.memory import peak_rss_mb
from shared.app.metadata import write_file
from shared.app.schema import read_json_object
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import UserError
from shared.quant.recipe import KEPT, Recipe, Rule

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.presets import Preset
    from shared.quant.convert import Conversion, LayerReport, OnProgress

FINETUNES = "finetunes"
WORST = 10
_KINDS = ("transformer", "checkpoint")
_NO_CALIBRATION = (
    "SVDQuant without calibration: no activations were looked at, so nothing is smoothed; "
    "the low-rank branch makes up for the weights' rounding only."
)


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """What the command line asks for. recipe: a name or a file. keep: patterns of layers that stay as they are.

    rank: None for the default. like: id of the preset whose settings the new one takes, "" to find it by the file.
    """

    source: Path
    output: Path
    recipe: str
    rank: int | None = None
    keep: Sequence[str] = ()
    like: str = ""
    with_preset: bool = True
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What was written. layers: every matrix, in the file's order. preset: its id, "" when none was made."""

    output: Path
    report: Path
    bytes: int
    seconds: float
    peak_rss_mb: float | None
    layers: Sequence[LayerReport]
    notes: Sequence[str]
    preset: str

    @property
    def quantized(self) -> list[LayerReport]:
        """The matrices that were not left plain, the least exact first."""
        from shared.quant.targets import PLAIN

        return sorted((r for r in self.layers if r.format not in PLAIN), key=lambda r: -r.relative_error)

    def as_dict(self) -> dict[str, Any]:
        quantized = self.quantized
        mean = sum(r.relative_error for r in quantized) / len(quantized) if quantized else 0.0
        return {
            "output": str(self.output),
            "bytes": self.bytes,
            "layers": dict(Counter(r.format for r in self.layers)),
            "seconds": round(self.seconds, 1),
            "peak_rss_mb": None if self.peak_rss_mb is None else round(self.peak_rss_mb),
            "worst": [asdict(r) for r in quantized[:WORST]],
            "mean_relative_error": mean,
            "report": str(self.report),
            "preset": self.preset,
            "notes": list(self.notes),
        }


def quantize(ctx: AppContext, request: QuantizeRequest, on_progress: OnProgress) -> QuantizeResult:
    """Convert, then write OUT.report.json and the preset. Raises UserError before anything is written where it can."""
    from shared.quant.convert import convert, convert_to_gguf, plan_conversion
    from shared.quant.targets import DEFAULT_RANK, targets

    started = time.monotonic()
    _check_paths(request)
    family = _family_of(ctx, request.source)
    like = _preset_like(ctx, request) if request.with_preset else None
    known = targets()
    recipe = _recipe(request, family.RECIPES, [*known, "bf16", "fp16"])
    model = family.open_model(request.source)
    is_gguf = request.output.suffix.lower() == ".gguf"
    conversion = plan_conversion(model, recipe, known, gguf=is_gguf)
    _check_keep(request, conversion)
    if request.rank is not None and not (conversion.has_rank and request.rank > 0):
        raise UserError(f"--rank {request.rank}: a positive number, for SVDQ formats only.", "Leave it out.")
    rank = request.rank or DEFAULT_RANK
    naming = "official" if is_gguf else conversion.naming
    metadata = family.header(naming, conversion.formats, model.config, rank)
    if is_gguf:
        layers = convert_to_gguf(
            conversion, request.output, metadata={"config": metadata["config"]}, on_progress=on_progress
        )
    else:
        rules = [[rule.pattern.pattern, rule.format] for rule in recipe.rules]
        identity = {"source": _stamps(model.checkpoint), "rules": rules, "rank": rank}
        layers = convert(
            conversion, request.output, rank=rank, metadata=metadata, identity=identity, on_progress=on_progress
        )
    result = QuantizeResult(
        output=request.output,
        report=request.output.with_name(f"{request.output.name}.report.json"),
        bytes=request.output.stat().st_size,
        seconds=time.monotonic() - started,
        peak_rss_mb=peak_rss_mb(),
        layers=layers,
        notes=(_NO_CALIBRATION,) if conversion.has_rank else (),
        preset=_register(ctx, like, request, recipe) if like else "",
    )
    said = {"source": str(request.source), "recipe": str(recipe.path), "rank": rank if conversion.has_rank else None}
    _write_json(result.report, said | result.as_dict() | {"every_layer": [asdict(r) for r in layers]})
    return result


def recipe_names(root: Path) -> list[str]:
    """Recipes that come with the program, by the name that --format and --recipe take."""
    return sorted({path.stem for path in (root / "models").glob("*/recipes/*.json")})


def _check_paths(request: QuantizeRequest) -> None:
    output = request.output
    if output.suffix.lower() not in (".safetensors", ".sft", ".gguf"):
        raise UserError(f"--output {output}: a name that ends in .safetensors or .gguf is needed.")
    if not output.exists():
        return
    if output.is_dir() or (request.source.exists() and output.samefile(request.source)):
        raise UserError(f"--output {output} is a folder, or the file to be converted.", "Choose another name.")
    if not request.overwrite:
        raise UserError(f"{output} is there already.", "Choose another name, or add --overwrite.")


def _family_of(ctx: AppContext, source: Path) -> Any:
    """The conversion module of the family that the file belongs to."""
    checkpoint = Checkpoint.open(source)
    for family in ctx.families.infos:
        name = f"models.{family}.conversion"
        if util.find_spec(name) is None:
            continue
        described = describe_checkpoint(checkpoint, {family: None})
        if described["kind"] in _KINDS:
            return import_module(name)
    described = describe_checkpoint(checkpoint, ctx.families.infos)
    raise UserError(
        f"{source}: {described['summary']}; only transformers can be converted.", "`wgp.py inspect FILE` says more."
    )


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


def _check_keep(request: QuantizeRequest, conversion: Conversion) -> None:
    names = [name for job in conversion.jobs for name in job.place.official]
    for pattern in request.keep:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise UserError(
                f"--keep {pattern} fits no layer's whole name; they look like {names[len(names) // 2]}.",
                r"Write layers\.0\..* for the first block, for example.",
            )


def _stamps(checkpoint: Checkpoint) -> list[list[Any]]:
    """What tells that the source is still the same."""
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in checkpoint.files]


def _preset_like(ctx: AppContext, request: QuantizeRequest) -> Preset:
    """The preset named, else the one that uses the source file, else the plain Turbo model's."""
    if request.like:
        return ctx.presets.get(request.like)
    source = request.source.resolve()

    def uses_source(preset: Preset) -> bool:
        found = (ctx.files.find(url) for url in preset.urls)
        return any(path is not None and path.resolve() == source for path in found)

    return next((p for p in ctx.presets.presets.values() if uses_source(p)), None) or ctx.presets.get("z_image")


def _register(ctx: AppContext, like: Preset, request: QuantizeRequest, recipe: Recipe) -> str:
    """Write a preset for the new file into finetunes/; returns its id."""
    merged: dict[str, Any] = {"model": {}}
    for path in like.files:
        found = read_json_object(path)
        merged = merged | found | {"model": merged["model"] | found.get("model", {})}
    url = str(request.output.resolve())
    merged["model"] |= {
        "name": f"{like.name}, {recipe.path.stem}",
        "description": f"Converted from {request.source.name} by the recipe {recipe.path.stem}.",
        "URLs": [url],
    }
    base = re.sub(r"[^a-z0-9]+", "_", request.output.stem.lower()).strip("_") or "converted"
    folder = ctx.root / FINETUNES
    folder.mkdir(exist_ok=True)
    names = [base, *(f"{base}_{number}" for number in range(2, 1000))]
    preset_id = next(n for n in names if n not in ctx.presets.presets or ctx.presets.presets[n].urls == (url,))
    _write_json(folder / f"{preset_id}.json", merged)
    return preset_id


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=4, ensure_ascii=False) + "\n"
    write_file(path, lambda file: file.write(text.encode("utf-8")))

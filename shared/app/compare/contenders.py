"""The models to compare: the preset's own file, files as they are, and formats written when their turn comes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shared.app.compare.request import ALL, CompareRequest
from shared.app.plan import find_files
from shared.app.presets import Preset, choose_files
from shared.app.quantize import QuantizeRequest, quantize, recipe_names
from shared.quant.checkpoint import INDEX_SUFFIX, Checkpoint
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.context import AppContext

# Formats with a low-rank branch are written in these ranks when all are asked for: those of published files.
PUBLISHED_RANKS: Mapping[str, tuple[int, ...]] = {"svdq_int4": (32, 128, 256), "svdq_fp4": (32, 128)}
# The numbers of another format, spelt otherwise: pictures of one are those of the other, so that all leave them out.
SPELLINGS = frozenset({"fp8_legacy", "mxfp8_e8m0"})
_RANKED = re.compile(r"(?P<recipe>svdq_\w+?)_r(?P<rank>[1-9]\d*)")
_PLAIN_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
Say = Callable[[str], None]


def format_names(root: Path) -> list[str]:
    """What `all` means, in its order: formats with a rank once for each published one, spellings of one format once."""
    names = []
    for recipe in (name for name in recipe_names(root) if name not in SPELLINGS):
        ranks = PUBLISHED_RANKS.get(recipe, ())
        names += [f"{recipe}_r{rank}" for rank in ranks] or [recipe]
    return names


def chosen_formats(ctx: AppContext, request: CompareRequest) -> list[str]:
    """The formats that were asked for. Raises UserError for one that does not exist."""
    known = format_names(ctx.root)
    if ALL in request.formats:
        return known
    recipes = recipe_names(ctx.root)
    for name in request.formats:
        ranked = _RANKED.fullmatch(name)
        if (ranked["recipe"] if ranked else name) not in recipes:
            raise UserError(
                f"--formats: there is no format {name}.", f"Known are {', '.join(known)}; other ranks as svdq_int4_r64."
            )
    return list(dict.fromkeys(request.formats))


def reference_file(ctx: AppContext, preset: Preset) -> Path:
    """The preset's own transformer. Raises UserError where it is not on this machine."""
    wanted = next(file for file in find_files(ctx, choose_files(preset)) if file.role == "transformer")
    if wanted.path is None:
        raise UserError(
            f"{preset.id}: {wanted.url} is not on this machine.",
            f"Draw one picture with it first: wgp.py generate PROMPT --preset {preset.id}.",
        )
    return wanted.path


def _plain_name(path: Path) -> str:
    """What the reference is called: its number type, or "reference" when it is packed itself."""
    matrices = {info.dtype for info in Checkpoint.open(path).tensors.values() if len(info.shape) == 2}
    return _PLAIN_NAMES.get(next(iter(matrices)), "reference") if len(matrices) == 1 else "reference"


def contenders(
    ctx: AppContext, request: CompareRequest, reference: Path, formats: Sequence[str], say: Say
) -> Iterator[tuple[str, Path | UserError]]:
    """Name and file of each column, the reference first. A format is written when its turn comes."""
    reference_name = _plain_name(reference)
    yield reference_name, reference
    for path in request.files:
        yield _column_name(path), path
    for name in formats:
        if name == reference_name:
            continue
        try:
            yield name, _written(ctx, reference, request.output / "weights", name, say)
        except UserError as error:
            yield name, error


def _column_name(path: Path) -> str:
    return path.name.removesuffix(INDEX_SUFFIX) if path.name.endswith(INDEX_SUFFIX) else path.stem


def _written(ctx: AppContext, source: Path, folder: Path, name: str, say: Say) -> Path:
    """The source in this format: the file of an earlier comparison while the source is the same, else a new one."""
    from shared.quant.targets import targets

    ranked = _RANKED.fullmatch(name)
    recipe, rank = (ranked["recipe"], int(ranked["rank"])) if ranked else (name, None)
    stamps = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in Checkpoint.open(source).files]
    digest = hashlib.sha256(json.dumps([stamps, name]).encode()).hexdigest()[:8]
    target = targets().get(recipe)
    output = folder / f"{name}-{digest}{'.gguf' if target is not None and target.gguf else '.safetensors'}"
    if output.is_file():
        return output
    request = QuantizeRequest(source=source, output=output, recipe=recipe, rank=rank, with_preset=False)
    say(f"{name}: converting")
    quantize(ctx, request, lambda done, total, module: say(f"{name}: converting, {done / total:.0%}"))
    return output

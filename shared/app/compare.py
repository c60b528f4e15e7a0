"""`compare`: one model in many weight formats, the same prompts and seeds with each, and how far they stray.

    the preset's transformer -> each format's file (kept in OUTPUT/weights) -> pictures -> differences from the first

The first column is the preset's own file, the reference. A LoRA is judged by what it changes in the picture (with minus
without): that change in all pictures, correlated with the change in the reference's; and the same for the latents,
which a decoder that saturates cannot distort.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Protocol, cast

from shared.app.contact_sheet import ContactSheet
from shared.app.drawing import DrawJob, Drawn, Spent, draw_elsewhere
from shared.app.format_order import Finding, findings
from shared.app.metadata import write_file
from shared.app.picture_metrics import correlation, psnr, relative_error, ssim
from shared.app.plan import find_files
from shared.app.presets import LoraChoice, Preset, choose_files
from shared.app.quantize import QuantizeRequest, quantize, recipe_names
from shared.app.settings import GenerationSettings, loras_as_host_settings
from shared.quant.checkpoint import INDEX_SUFFIX, Checkpoint
from shared.quant.errors import RunError, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shared.app.context import AppContext

DEFAULT_COUNT = 32
ALL = "all"
FIRST_SEED = 20_000  # picture i is drawn with this seed + i

# Formats with a low-rank branch are written in these ranks when all are asked for: those of published files.
PUBLISHED_RANKS: Mapping[str, tuple[int, ...]] = {"svdq_int4": (32, 128, 256), "svdq_fp4": (32, 128)}
# The numbers of another format, spelt otherwise: pictures of one are those of the other, so that all leave them out.
SPELLINGS = frozenset({"fp8_legacy", "mxfp8_e8m0"})
_RANKED = re.compile(r"(?P<recipe>svdq_\w+?)_r(?P<rank>[1-9]\d*)")
_PLAIN_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}

PROMPTS: tuple[str, ...] = (
    "a lighthouse at dusk",
    "a bowl of ripe cherries on a wooden table",
    "an old street in the rain, reflections of neon signs",
    "a portrait of an elderly fisherman, weathered face",
    "a red fox in fresh snow",
    'a shop window with the words "OPEN TODAY"',
    "a glass teapot with green tea, morning light",
    "a mountain lake seen from above",
)
"""What is drawn with a preset that has no scorer, over and over with other seeds."""


class Scorer(Protocol):
    """A module that can read pictures, such as training.judge: `--scorer` names it, or the preset's "scorer"."""

    def held_out_captions(self, count: int, seed: int) -> Sequence[Any]:
        """Prompts and what each promises; `text` of each is the prompt."""

    def judge_picture(self, picture: NDArray, caption: Any) -> Any:
        """Which promises an (H, W, 3) uint8 picture keeps: a dataclass of truth values; `everything`: all of them."""


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """What the command line asks for.

    formats: names to write the preset's transformer in, or ("all",). files: further transformers, as they are.
    prompts: instead of the scorer's. settings: host keys for all pictures. scorer: "" for the preset's own.
    lora_count: prompts that are drawn with the LoRA too; 0 for all.
    jobs: models that are drawn with at a time, sharing the CPU's cores.
    """

    preset: str
    output: Path
    formats: Sequence[str] = ()
    files: Sequence[Path] = ()
    prompts: Sequence[str] = ()
    count: int = DEFAULT_COUNT
    settings: Mapping[str, Any] = field(default_factory=dict)
    lora: LoraChoice | None = None
    scorer: str = ""
    lora_count: int = 0
    jobs: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One format's figures: means over all pictures, except seconds (the median, loading apart) and psnr (all pixels).

    peak_rss_mb, peak_vram_mb: MiB of the drawing process. psnr: dB, infinite where all pictures are equal.
    latent_error: of the last latents, relative. adherence: share of pictures that keep all promises; kept: share that
    keeps each; lost, gained: pictures that keep all with the reference only, and with this only. lora, lora_latents:
    correlation of what the LoRA changes, in pictures and in latents. problem: why there are no figures.
    """

    name: str
    file: str
    bytes: int
    load_seconds: float = 0.0
    seconds: float = 0.0
    peak_rss_mb: float | None = None
    peak_vram_mb: float = 0.0
    psnr: float = math.inf
    ssim: float = 1.0
    latent_error: float = 0.0
    adherence: float | None = None
    kept: Mapping[str, float] = field(default_factory=dict)
    lost: int = 0
    gained: int = 0
    lora: float | None = None
    lora_latents: float | None = None
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: JSON has no infinity, so equal pictures have a PSNR of null."""
        return {key: _for_json(value) for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The rows, the reference first; whether they are in the order that is expected; and where the rest lies."""

    preset: str
    device: str
    dtype: str
    prompts: Sequence[str]
    settings: Mapping[str, Any]
    lora: str
    rows: Sequence[Row]
    sheet: Path
    report: Path
    order: Sequence[Finding] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "rows": [row.as_dict() for row in self.rows],
            "sheet": str(self.sheet),
            "report": str(self.report),
        }


@dataclass(frozen=True)
class _Pictures:
    """What one model drew: plain, and with the LoRA when there is one."""

    plain: list[Drawn]
    with_lora: list[Drawn]
    spent: Spent


Say = Callable[[str], None]
Draw = Callable[[DrawJob], Iterator[Drawn | Spent]]


def compare(ctx: AppContext, request: CompareRequest, say: Say, draw: Draw = draw_elsewhere) -> Comparison:
    """Write the formats, draw with each, measure, and leave report.json, sheet.png and the pictures in the output.

    say: what is going on, in words. draw: how a model's pictures are made. A format that cannot be written or drawn
    with gets a row that says why, and the rest goes on; without the reference nothing does. Raises UserError before
    anything is drawn where it can.
    """
    from PIL import Image

    preset = ctx.presets.get(request.preset)
    formats = _formats(ctx, request)
    scorer = _scorer(request.scorer or str(preset.model_def.get("scorer") or ""), request.prompts)
    captions = scorer.held_out_captions(request.count, FIRST_SEED) if scorer else []
    prompts = [str(caption.text) for caption in captions] or _repeated(request.prompts or PROMPTS, request.count)
    pictures = _pictures_of(request, prompts)
    _check_settings(preset, pictures)
    reference_file = _reference(ctx, preset)
    _know_the_text_encoder(ctx, preset)
    request.output.mkdir(parents=True, exist_ok=True)

    sheet = ContactSheet(prompts)
    rows: list[Row] = []
    reference: _Pictures | None = None
    verdicts_before: list[Any] = []  # on the reference's pictures
    job = DrawJob(
        root=ctx.root, args=_flags(ctx), preset=preset.id, file=reference_file, pictures=pictures,
        threads=max((os.cpu_count() or 1) // request.jobs, 1) if request.jobs > 1 else 0,
    )  # fmt: skip

    def draw_all(name: str, path: Path) -> _Pictures:
        return _drawn(draw(replace(job, file=path)), len(prompts), lambda words: say(f"{name}: {words}"))

    contenders = _contenders(ctx, request, reference_file, _plain_name(reference_file), formats, say)
    for name, path, outcome in _at_a_time(request.jobs, contenders, draw_all):
        if isinstance(path, UserError):
            rows.append(Row(name=name, file="", bytes=0, problem=str(path)))
            continue
        try:
            found = outcome()
        except UserError as error:
            if reference is None:
                raise
            rows.append(Row(name=name, file=str(path), bytes=_size(path), problem=str(error)))
            continue
        reference = reference or found
        verdicts = _verdicts(found, scorer, captions)
        verdicts_before = verdicts_before or verdicts
        rows.append(replace(_row(name, path, found, reference), **_adherence(verdicts, verdicts_before)))
        images = [Image.fromarray(drawn.picture) for drawn in found.plain]
        sheet.add(name, images)
        _save_pictures(request.output / name, images)
    result = Comparison(
        preset=preset.id,
        **_machine(ctx, preset),
        prompts=prompts,
        settings=dict(request.settings),
        lora=f"{request.lora.file}:{request.lora.multiplier}" if request.lora else "",
        rows=rows,
        order=findings(rows, len(prompts)),
        sheet=request.output / "sheet.png",
        report=request.output / "report.json",
    )
    picture = sheet.draw()
    write_file(result.sheet, lambda file: picture.save(file, "PNG"))
    text = json.dumps(result.as_dict(), indent=2, ensure_ascii=False) + "\n"
    write_file(result.report, lambda file: file.write(text.encode("utf-8")))
    return result


def _at_a_time(
    jobs: int, contenders: Iterator[tuple[str, Path | UserError]], draw: Callable[[str, Path], _Pictures]
) -> Iterator[tuple[str, Path | UserError, Callable[[], _Pictures]]]:
    """Each contender in its order with its pictures to be waited for, while `jobs` at most are being drawn."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting: deque[tuple[str, Path | UserError, Callable[[], _Pictures]]] = deque()
        for name, path in contenders:
            outcome = _not_drawn if isinstance(path, UserError) else pool.submit(draw, name, path).result
            waiting.append((name, path, outcome))
            while len(waiting) >= jobs:
                yield waiting.popleft()
        yield from waiting


def _not_drawn() -> _Pictures:
    raise RunError("There is no file to draw with.")


def format_names(root: Path) -> list[str]:
    """What `all` means, in its order: formats with a rank once for each published one, spellings of one format once."""
    names = []
    for recipe in (name for name in recipe_names(root) if name not in SPELLINGS):
        ranks = PUBLISHED_RANKS.get(recipe, ())
        names += [f"{recipe}_r{rank}" for rank in ranks] or [recipe]
    return names


def _formats(ctx: AppContext, request: CompareRequest) -> list[str]:
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


def _scorer(name: str, prompts: Sequence[str]) -> Scorer | None:
    """The module of that name; None without one, and for prompts of the user's own: nobody knows what they promise."""
    if not name or prompts:
        return None
    try:
        module = import_module(name)
    except ImportError as error:
        raise UserError(f"The scorer {name} cannot be imported: {error}.", "Name a module of this program.") from error
    missing = [part for part in ("held_out_captions", "judge_picture") if not hasattr(module, part)]
    if missing:
        raise UserError(f"The module {name} is no scorer: it has no {' and no '.join(missing)}.")
    return cast("Scorer", module)


def _repeated(prompts: Sequence[str], count: int) -> list[str]:
    return [prompts[index % len(prompts)] for index in range(count)]


def _pictures_of(request: CompareRequest, prompts: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Settings of each picture: all without the LoRA, then the first `lora_count` with it."""
    plain = [
        {**request.settings, "prompt": prompt, "seed": FIRST_SEED + index, "batch_size": 1}
        for index, prompt in enumerate(prompts)
    ]
    if request.lora is None:
        return tuple(plain)
    lora = loras_as_host_settings([request.lora])
    return (*plain, *({**settings, **lora} for settings in plain[: request.lora_count or None]))


def _check_settings(preset: Preset, pictures: Sequence[Mapping[str, Any]]) -> None:
    for settings in (pictures[0], pictures[-1]):
        GenerationSettings.build(preset, {}, settings)


def _reference(ctx: AppContext, preset: Preset) -> Path:
    wanted = next(file for file in find_files(ctx, choose_files(preset)) if file.role == "transformer")
    if wanted.path is None:
        raise UserError(
            f"{preset.id}: {wanted.url} is not on this machine.",
            f"Draw one picture with it first: wgp.py generate PROMPT --preset {preset.id}.",
        )
    return wanted.path


def _know_the_text_encoder(ctx: AppContext, preset: Preset) -> None:
    """Have its hash at hand, by which prompts are remembered: then the first model alone needs to load it."""
    for file in find_files(ctx, choose_files(preset)):
        if file.role == "text_encoder" and file.path is not None:
            for part in Checkpoint.open(file.path).files:
                ctx.files.sha256(part)


def _plain_name(path: Path) -> str:
    """What the reference is called: its number type, or "reference" when it is packed itself."""
    matrices = {info.dtype for info in Checkpoint.open(path).tensors.values() if len(info.shape) == 2}
    return _PLAIN_NAMES.get(next(iter(matrices)), "reference") if len(matrices) == 1 else "reference"


def _contenders(
    ctx: AppContext, request: CompareRequest, reference: Path, reference_name: str, formats: Sequence[str], say: Say
) -> Iterator[tuple[str, Path | UserError]]:
    """Name and file of each column, the reference first. A format is written when its turn comes."""
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


def _drawn(messages: Iterator[Drawn | Spent], count: int, say: Say) -> _Pictures:
    drawn: list[Drawn] = []
    for message in messages:
        if isinstance(message, Spent):
            return _Pictures(drawn[:count], drawn[count:], message)
        drawn.append(message)
        say(f"picture {len(drawn)}")
    raise RunError("The pictures ended before their account.")


def _row(name: str, path: Path, found: _Pictures, reference: _Pictures) -> Row:
    import numpy as np

    pairs = list(zip(found.plain, reference.plain, strict=True))
    return Row(
        name=name,
        file=str(path),
        bytes=_size(path),
        load_seconds=found.spent.load_seconds,
        seconds=median(drawn.seconds for drawn in found.plain),
        peak_rss_mb=found.spent.peak_rss_mb,
        peak_vram_mb=found.spent.peak_vram_mb,
        psnr=psnr(np.stack([a.picture for a, _ in pairs]), np.stack([b.picture for _, b in pairs])),
        ssim=fmean(ssim(a.picture, b.picture) for a, b in pairs),
        latent_error=fmean(relative_error(a.latents, b.latents) for a, b in pairs),
        lora=_alike(found, reference, lambda drawn: drawn.picture),
        lora_latents=_alike(found, reference, lambda drawn: drawn.latents),
    )


def _alike(found: _Pictures, reference: _Pictures, values: Callable[[Drawn], NDArray]) -> float | None:
    """How alike the LoRA's change of all pictures is to its change of the reference's; None without a LoRA."""
    import numpy as np

    def change(pictures: _Pictures) -> NDArray:
        pairs = zip(pictures.with_lora, pictures.plain, strict=False)  # the first ones, where not all are drawn so
        return np.stack([np.subtract(values(a), values(b), dtype=np.float64) for a, b in pairs])

    return correlation(change(found), change(reference)) if found.with_lora else None


def _verdicts(found: _Pictures, scorer: Scorer | None, captions: Sequence[Any]) -> list[Any]:
    """What the scorer reads in each plain picture; none without a scorer."""
    if scorer is None:
        return []
    return [scorer.judge_picture(drawn.picture, c) for drawn, c in zip(found.plain, captions, strict=True)]


def _adherence(verdicts: Sequence[Any], before: Sequence[Any]) -> dict[str, Any]:
    """The fields of a row that verdicts give, held against those on the reference's pictures."""
    if not verdicts:
        return {}
    said = [asdict(verdict) for verdict in verdicts] if is_dataclass(verdicts[0]) else [{}]
    whole = [(bool(old.everything), bool(new.everything)) for old, new in zip(before, verdicts, strict=True)]
    return {
        "adherence": fmean(new for _, new in whole),
        "kept": {promise: fmean(bool(verdict[promise]) for verdict in said) for promise in said[0]},
        "lost": whole.count((True, False)),
        "gained": whole.count((False, True)),
    }


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in Checkpoint.open(path).files)


def _save_pictures(folder: Path, images: Sequence[Any]) -> None:
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        write_file(folder / f"{number:03}.png", lambda file, image=image: image.save(file, "PNG"))  # type: ignore[misc]


def _flags(ctx: AppContext) -> argparse.Namespace:
    """The command line's flags for another process, which finds the families by itself."""
    return argparse.Namespace(**{key: value for key, value in vars(ctx.args).items() if key != "families"})


def _machine(ctx: AppContext, preset: Preset) -> dict[str, str]:
    from shared.app.plan import find_machine, requested_device

    machine = find_machine(preset, requested_device(ctx))
    return {"device": machine.device.name, "dtype": machine.dtype.value}


def _for_json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

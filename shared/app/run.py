"""One call of `generate`: from the plan through files, model and pictures to the result.

A batch is drawn picture by picture: each has its own seed (seed + i), looks the same alone as in the batch, is saved
as soon as it is done, and is kept when the next one is interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.annotators import fetch
from shared.app.clock import Clock
from shared.app.download import DownloadCancelled
from shared.app.editing import Edit, Pass, open_edit
from shared.app.events import STAGES, Downloading, GenerationResult, ImageDone, OnEvent, ShouldStop, Status, StepDone
from shared.app.loading import LoadedModel, ModelHolder
from shared.app.loras import match_words
from shared.app.memory import peak_rss_mb, peak_vram_mb, reset_peak_vram
from shared.app.memory_plan import Relief, next_relief
from shared.app.metadata import build_record, save_image
from shared.app.output import OutputPlace, resolve_output
from shared.app.plan import (
    Choice,
    GenerationPlan,
    Machine,
    PlannedFile,
    find_machine,
    find_machine_quickly,
    make_plan,
    requested_device,
    safer_type,
)
from shared.app.presets import Preset
from shared.app.prompts import WILDCARD_FOLDER, pictures
from shared.app.retry import DOING, free_memory, given_up
from shared.app.settings import MAX_SEED
from shared.app.weight_hashes import WEIGHT_ROLES, WeightHashes, weights_of
from shared.preprocess import Preprocessor
from shared.quant.errors import NumbersError, RunError, UserError, is_out_of_memory

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from shared.app.context import AppContext
    from shared.app.settings import GenerationSettings


def memory_key(preset: Preset, settings: GenerationSettings) -> tuple[Any, ...]:
    """What decides how much memory a generation takes, and so whether a lesson of another one holds for it."""
    return (preset.id, settings.width, settings.height, settings.guidance_scale > 0, settings.edit.hires_scale)


class _Stopped(Exception):
    """The generation was asked to stop."""


class Run:
    """One call of `generate`, from files to pictures; what it has done so far is in its attributes."""

    def __init__(
        self,
        *,
        ctx: AppContext,
        model: ModelHolder,
        preset: Preset,
        settings: GenerationSettings,
        reliefs: dict[tuple[Any, ...], Relief],
        announce: OnEvent,
        should_stop: ShouldStop,
    ) -> None:
        self._ctx = ctx
        self._reliefs = reliefs
        self._stage = "load"  # where memory may run out: a key of retry.DOING
        self._tried: list[str] = []
        self._notes: list[str] = []
        self._tile: int | None = None  # latent cells; None leaves the settings' own
        self._model = model
        self._preset = preset
        self._settings = settings
        self._announce = announce
        self._should_stop = should_stop
        self._alone: Sequence[GenerationSettings] = ()  # the settings of each picture
        self._images: list[ImageDone] = []
        self._forwards = self._saved = 0
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._kernels: list[str] = []
        self._files: list[dict[str, str]] = []
        self._loras: list[dict[str, Any]] = []
        self._safer: dict[str, str] = {}

    def __call__(self, output: Path | str | None) -> GenerationResult:
        began = time.perf_counter()
        cancelled = False
        reset_peak_vram()
        try:
            self._alone = pictures(self._settings, self._ctx.root / WILDCARD_FOLDER)
            place = resolve_output(output, self._ctx.output_folder, len(self._alone))
            place.prepare()  # before the model is loaded: no minute of loading for a slip of the pen
            self._draw(place)
        except (_Stopped, DownloadCancelled):
            cancelled = True
        self._seconds["total"] = time.perf_counter() - began
        return self.result(cancelled=cancelled)

    def result(self, *, cancelled: bool) -> GenerationResult:
        return GenerationResult(
            images=self._images,
            preset=self._preset.id,
            forwards=self._forwards,
            seconds=self._seconds,
            peak_rss_mb=peak_rss_mb(),
            peak_vram_mb=peak_vram_mb(),
            kernels=self._kernels,
            files=self._files,
            loras=self._loras,
            notes=self._notes,
            lossy=self._lossy() if self._settings.sampling.step_cache and self._images else "",
            cancelled=cancelled,
        )

    def _draw(self, place: OutputPlace) -> None:
        began = time.perf_counter()
        device = requested_device(self._ctx)
        # Mistakes show in the plan: a first one is made without waiting for torch, where that is possible.
        relief = self._reliefs.get(memory_key(self._preset, self._settings))
        make_plan(self._ctx, self._preset, self._settings, find_machine_quickly(self._preset, device))
        plan = make_plan(self._ctx, self._preset, self._settings, find_machine(self._preset, device), relief)
        edit = open_edit(self._settings, plan.preset.model_def, self._ctx.output_folder)
        for note in edit.notes:
            self._announce(Status(f"Note: {note}."))
        planned = time.perf_counter()
        if plan.missing:
            self._fetch(plan.missing)
            # Planned again: now the sizes are known, and with them the memory profile.
            plan = make_plan(self._ctx, self._preset, self._settings, plan.machine, relief)
        edit = edit.with_preprocessor(self._fetch_preprocessor())
        self._stop_if_asked()
        hashes = WeightHashes(self._ctx.files.sha256, weights_of(plan.files))
        self._seconds["load"] = planned - began
        while len(self._images) < len(self._alone):
            try:
                self._draw_planned(plan, edit, place, hashes)
            except NumbersError as error:
                plan = self._plan_in_safer_type(plan, error)
            except (MemoryError, RuntimeError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
                plan = self._easier_plan(plan, error)

    def _easier_plan(self, plan: GenerationPlan, error: BaseException) -> GenerationPlan:
        """The next plan after memory ran out under this one; memory is freed. Raises RunError when none is left.

        Later generations of this size begin with it.
        """
        stage = "text" if self._stage == "load" and self._model.is_loaded else self._stage
        relief = self._relief()
        found = self._next_relief(plan, stage)
        if not found or found[0].engine != relief.engine or found[0].share != relief.share:
            self._model.release()
        free_memory(error)
        if not found:
            size = f"{self._settings.width}x{self._settings.height}"
            raise given_up(stage, size, self._preset.id, self._tried, error) from error
        self._learn(stage, *found)
        return make_plan(self._ctx, self._preset, self._settings, plan.machine, self._relief())

    def _decode_again(self, plan: GenerationPlan, model: LoadedModel, error: BaseException) -> Tensor | None:
        """The picture that memory ran out for in the decoder, from the same latents in smaller and smaller tiles.

        Raises the error where tiles are no way out: in another stage, and when the smallest do not do.
        """
        # What a Wan2GP family lacks.
        decode: Callable[[int], Tensor | None] | None = getattr(model.processor, "decode_again", None)
        while decode is not None and self._stage == "decode":
            found = self._next_relief(plan, "decode")
            tile = found[0].tile if found else None
            if not found or tile is None or tile == self._relief().tile:
                break
            free_memory(error)
            self._learn("decode", *found)
            self._tile = tile
            try:
                return decode(tile)
            except (MemoryError, RuntimeError, OSError) as again:
                if not is_out_of_memory(again):
                    raise
                error = again
        raise error

    def _relief(self) -> Relief:
        """What memory that ran out has taught of pictures like this one."""
        return self._reliefs.get(memory_key(self._preset, self._settings)) or Relief()

    def _next_relief(self, plan: GenerationPlan, stage: str) -> tuple[Relief, str] | None:
        """What to try now, and in words; None when nothing is left."""
        if plan.placement is None:
            return None
        placed = plan.placement if self._tile is None else replace(plan.placement, tile=self._tile)
        return next_relief(self._relief(), stage, placed, plan.machine.device)

    def _learn(self, stage: str, relief: Relief, words: str) -> None:
        """Tell what is tried now, and begin with it next time."""
        self._reliefs[memory_key(self._preset, self._settings)] = relief
        self._tried.append(words)
        self._notes.append(f"Memory ran out while {DOING[stage]}; {words}.")
        self._announce(Status(self._notes[-1]))

    def _draw_planned(self, plan: GenerationPlan, edit: Edit, place: OutputPlace, hashes: WeightHashes) -> None:
        """Load the model of the plan and draw every picture that is not drawn yet."""
        began = time.perf_counter()
        self._stage = "load"
        placed = plan.placement
        self._tile = None if placed is None else placed.tile
        if placed is not None and (placed.engine != "direct" or len(placed.sentences) > 1):
            self._announce(Status(placed.words))  # something is done about memory
        orders = [settings.host_kwargs() | edit.prompt_kwargs for settings in self._alone]
        model = self._model.ensure(plan, lambda words: self._announce(Status(words)), orders)
        self._kernels = [f"{k.layers} {k.packing} layers by {k.kernel}" for k in model.kernels]
        self._loras = [match.as_dict() for match in model.lora_matches]
        for match in self._loras:
            self._announce(Status(match_words(match)))
        self._seconds["text"] += model.text_seconds
        self._seconds["load"] += time.perf_counter() - began - model.text_seconds

        clock = Clock(images=len(self._alone) - len(self._images), steps=self._settings.num_inference_steps)
        for index in range(len(self._images), len(self._alone)):
            self._stop_if_asked()
            picture, seconds = self._draw_one(plan, model, edit, index, clock)
            plan = self._remember_remedies(plan, model)
            self._files = hashes.result()
            if model.prompts is not None:
                model.prompts.flush()  # the text encoder's hash is known by now
            self._save(place, plan, edit, picture, index, seconds)
            clock.image_done()

    def _remember_remedies(self, plan: GenerationPlan, model: LoadedModel) -> GenerationPlan:
        """Keep in mind what the model had to do against bad numbers; returns the plan that begins with it."""
        self._safer = dict(model.processor.report.get("safer") or {})
        new = {name: words for name, words in self._safer.items() if name not in plan.safer}
        if not new:
            return plan
        why = {name: f"{words}: with others, numbers were bad on this device" for name, words in new.items()}
        self._remember(plan, why)
        relief = self._reliefs.get(memory_key(self._preset, self._settings))
        plan = make_plan(self._ctx, self._preset, self._settings, plan.machine, relief)
        self._model.stands_for(plan)
        return plan

    def _plan_in_safer_type(self, plan: GenerationPlan, error: NumbersError) -> GenerationPlan:
        """The plan in a wider number type, which is remembered. Raises the error when there is none."""
        wider = safer_type(plan.machine)
        if wider is None:
            raise error
        why = f"numbers were bad in {plan.machine.dtype.value} on this device"
        self._announce(Status(f"{error.message} Drawing again in {wider}: {why}."))
        self._remember(plan, {"dtype": why})
        machine = Machine(plan.machine.device, Choice(wider, why))
        relief = self._reliefs.get(memory_key(self._preset, self._settings))
        return make_plan(self._ctx, self._preset, self._settings, machine, relief)

    def _remember(self, plan: GenerationPlan, choices: Mapping[str, str]) -> None:
        """Begin with these choices next time; a folder that cannot be written is no reason not to draw."""
        try:
            self._ctx.safer_choices().remember(plan.paths("transformer")[0], plan.machine.device, choices)
        except UserError as error:
            self._announce(Status(f"This is not remembered for the next picture: {error.message}"))

    def _fetch(self, missing: Iterable[PlannedFile]) -> None:
        """Download files. Raises UserError for one that cannot be downloaded, saying where to put it."""
        for file in missing:
            self._stop_if_asked()
            self._announce(Status(f"Looking for {file.url.rsplit('/', 1)[-1]}"))
            self._ctx.files.ensure(
                file.url,
                subfolder=file.subfolder,
                on_progress=lambda progress: self._announce(Downloading(progress)),
                should_stop=self._should_stop,
            )

    def _fetch_preprocessor(self) -> Preprocessor:
        """What makes the control picture, its model downloaded first where it has one."""
        return fetch(
            self._ctx.files,
            self._settings.edit,
            on_progress=lambda progress: self._announce(Downloading(progress)),
            should_stop=self._should_stop,
        )

    def _draw_one(
        self, plan: GenerationPlan, model: LoadedModel, edit: Edit, index: int, clock: Clock
    ) -> tuple[Image.Image, float]:
        """Picture `index`, by as many drawings as the edit asks for, and the seconds it took."""
        settings = self._alone[index]
        began = time.perf_counter()
        self._forwards = self._saved = 0
        drawn = 0

        def draw(asked: Pass) -> Image.Image:
            nonlocal drawn
            picture = self._draw_pass(plan, model, settings, asked, index, clock, drawn, edit.passes)
            drawn += 1
            return picture

        return edit.draw(draw), time.perf_counter() - began

    def _draw_pass(
        self,
        plan: GenerationPlan,
        model: LoadedModel,
        settings: GenerationSettings,
        asked: Pass,
        index: int,
        clock: Clock,
        drawn: int,
        passes: int,
    ) -> Image.Image:
        """One drawing of picture `index`, after `drawn` of `passes`."""
        model.processor._interrupt = False
        self._stage = "text"
        seed = (settings.seed + asked.seed) % (MAX_SEED + 1)
        steps = settings.num_inference_steps

        def on_step(step: int, latents: Tensor | None = None, _first: bool = False, total: int | None = None) -> None:
            nonlocal steps
            if self._should_stop():
                model.processor._interrupt = True
            if step < 0 or latents is None:  # the announcement before the first step
                self._stage = "denoise"
                steps = total or steps
                clock.steps = steps * passes
                return
            done = drawn * steps + step + 1
            if latents.device.type == "cpu":  # where looking is free; a family looks after its numbers itself
                _require_finite(latents, f"the latents after step {step + 1} of {steps}", self._preset, seed)
            if step + 1 == steps:
                self._stage = "decode"
            left = clock.step_done(done)
            forwards = self._forwards + int(model.processor.report.get("forwards", 0))
            self._announce(StepDone(index + 1, len(self._alone), done, clock.steps, left, forwards))

        planned = {} if self._tile is None else {"VAE_tile_size": self._tile}
        try:
            result = model.processor.generate(
                **{**settings.host_kwargs(), **planned, **asked.host_kwargs(), "seed": seed},
                callback=on_step,
                set_progress_status=lambda text: self._announce(Status(str(text))),
            )
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            result = self._decode_again(plan, model, error)
        if result is None:
            raise _Stopped
        _require_finite(result, "the decoded picture", self._preset, seed)
        report = model.processor.report
        self._forwards += int(report["forwards"])
        self._saved += int(report.get("saved", 0))
        for stage, seconds in report["seconds"].items():
            self._seconds[stage] += seconds
        return to_image(result)

    def _save(
        self, place: OutputPlace, plan: GenerationPlan, edit: Edit, picture: Image.Image, index: int, seconds: float
    ) -> None:
        settings = self._alone[index]
        created = datetime.now().astimezone()
        loras = [match | {"file": Path(match["file"]).name} for match in self._loras]
        names = {role: [f.path.name for f in plan.files if f.role == role and f.path] for role in WEIGHT_ROLES}
        record = build_record(
            settings.as_record() | edit.keep_sources(self._ctx.output_folder),
            defaults=plan.preset.settings,
            preset_id=plan.preset.id,
            preset_name=plan.preset.name,
            architecture=plan.preset.architecture,
            model_def=plan.preset.model_def,
            model_filename=names["transformer"][0],
            modules=names["module"],
            generation_seconds=seconds,
            created=created,
            provenance={
                "forwards": self._forwards,
                "device": plan.machine.device.name,
                "dtype": plan.machine.dtype.value,
                "attention": plan.attention.value,
                **({"kernels": self._kernels} if self._kernels else {}),
                **({"safer": self._safer} if self._safer else {}),
                **({"lossy": self._lossy()} if settings.sampling.step_cache else {}),
                **({"notes": self._notes} if self._notes else {}),
                # names only: a picture that is passed on should not tell where its maker keeps files
                "files": [{"name": Path(file["path"]).name, "sha256": file["sha256"]} for file in self._files],
                **({"loras": loras} if loras else {}),
                **({"pictures": edit.hashes} if edit.sources else {}),
            },
        )
        path = place.path_for(settings, index, created)
        save_image(path, picture, record)
        done = ImageDone(path, settings.seed, record, index + 1, len(self._alone))
        self._images.append(done)
        self._announce(done)
        if settings.sampling.step_cache:
            self._announce(Status(f"Lossy: {self._lossy()}"))

    def _lossy(self) -> str:
        """What a step cache has done to the last picture, in words."""
        of = self._forwards + self._saved
        return f"step cache {self._settings.sampling.step_cache:g}: {self._saved} of {of} forwards left out"

    def _stop_if_asked(self) -> None:
        if self._should_stop():
            raise _Stopped


def to_image(pixels: Tensor) -> Image.Image:
    """The first picture of (3, N, H, W) in [-1, 1], as 8 bits per channel, rounded."""
    import torch
    from PIL import Image

    levels = ((pixels[:, 0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def _require_finite(values: Tensor, what: str, preset: Preset, seed: int) -> None:
    if bool(values.isfinite().all()):
        return
    kind = "NaN" if bool(values.isnan().any()) else "infinite numbers"
    raise RunError(
        f"{preset.id}, seed {seed}: {what} contain {kind}; no picture was saved.",
        "The weights or their number format do not suit this device: try another file of the model, or --gpu cpu.",
    )

"""One call of `generate`: from the plan through files, model and pictures to the result.

A batch is drawn picture by picture: each has its own seed (seed + i), looks the same alone as in the batch, is saved
as soon as it is done, and is kept when the next one is interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.account import Account
from shared.app.annotators import fetch
from shared.app.clock import Clock
from shared.app.download import DownloadCancelled
from shared.app.editing import Edit, open_edit
from shared.app.events import Downloading, GenerationResult, ImageDone, OnEvent, ShouldStop, Status
from shared.app.loading import LoadedModel, ModelHolder
from shared.app.loras import match_words
from shared.app.memory import peak_rss_mb, peak_vram_mb, reset_peak_vram
from shared.app.memory_plan import Relief
from shared.app.metadata import build_record, save_image
from shared.app.one_picture import PictureDrawing, Stopped
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
from shared.app.retry import MemoryWatch, free_memory
from shared.app.weight_hashes import WEIGHT_ROLES, WeightHashes, weights_of
from shared.preprocess import Preprocessor
from shared.quant.errors import NumbersError, UserError, is_out_of_memory

if TYPE_CHECKING:
    from PIL import Image

    from shared.app.context import AppContext
    from shared.app.settings import GenerationSettings


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
        self._model = model
        self._preset = preset
        self._settings = settings
        self._announce = announce
        self._should_stop = should_stop
        self._watch = MemoryWatch(reliefs, preset, settings, announce)
        self._account = Account()
        self._alone: Sequence[GenerationSettings] = ()  # the settings of each picture
        self._images: list[ImageDone] = []

    def __call__(self, output: Path | str | None) -> GenerationResult:
        began = time.perf_counter()
        cancelled = False
        reset_peak_vram()
        try:
            self._alone = pictures(self._settings, self._ctx.root / WILDCARD_FOLDER)
            place = resolve_output(output, self._ctx.output_folder, len(self._alone))
            place.prepare()  # before the model is loaded: no minute of loading for a slip of the pen
            self._draw(place)
        except (Stopped, DownloadCancelled):
            cancelled = True
        self._account.seconds["total"] = time.perf_counter() - began
        return self.result(cancelled=cancelled)

    def result(self, *, cancelled: bool) -> GenerationResult:
        account = self._account
        return GenerationResult(
            images=self._images,
            preset=self._preset.id,
            forwards=account.forwards,
            seconds=account.seconds,
            peak_rss_mb=peak_rss_mb(),
            peak_vram_mb=peak_vram_mb(),
            kernels=account.kernels,
            files=account.files,
            loras=account.loras,
            notes=self._watch.notes,
            lossy=account.lossy(self._settings.sampling) if self._images else "",
            cancelled=cancelled,
        )

    def _draw(self, place: OutputPlace) -> None:
        began = time.perf_counter()
        device = requested_device(self._ctx)
        # Mistakes show in the plan: a first one is made without waiting for torch, where that is possible.
        relief = self._watch.learned
        make_plan(self._ctx, self._preset, self._settings, find_machine_quickly(self._preset, device))
        plan = make_plan(self._ctx, self._preset, self._settings, find_machine(self._preset, device), relief)
        edit = open_edit(self._settings, plan.preset.model_def, self._ctx.output_folder)
        for note in edit.notes:
            self._announce(Status(f"Note: {note}."))
        planned = time.perf_counter()
        if plan.missing:
            self._fetch(plan.missing)
            # Planned again: now the sizes are known, and with them the memory profile.
            plan = self._plan_again(plan.machine)
        edit = edit.with_preprocessor(self._fetch_preprocessor())
        self._stop_if_asked()
        hashes = WeightHashes(self._ctx.files.sha256, weights_of(plan.files))
        self._account.seconds["load"] = planned - began
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
        watch = self._watch
        stage = "text" if watch.stage == "load" and self._model.is_loaded else watch.stage
        relief, found = watch.relief, watch.next_relief(plan, stage)
        if not found or found[0].engine != relief.engine or found[0].share != relief.share:
            self._model.release()
        free_memory(error)
        if not found:
            raise watch.given_up(stage, error) from error
        watch.learn(stage, *found)
        return self._plan_again(plan.machine)

    def _plan_again(self, machine: Machine) -> GenerationPlan:
        """A plan for this machine that keeps to what was learned."""
        return make_plan(self._ctx, self._preset, self._settings, machine, self._watch.learned)

    def _draw_planned(self, plan: GenerationPlan, edit: Edit, place: OutputPlace, hashes: WeightHashes) -> None:
        """Load the model of the plan and draw every picture that is not drawn yet."""
        model = self._load(plan, edit)
        clock = Clock(images=len(self._alone) - len(self._images), steps=self._settings.num_inference_steps)
        for index in range(len(self._images), len(self._alone)):
            self._stop_if_asked()
            began = time.perf_counter()
            picture = self._draw_one(plan, model, edit, index, clock)
            seconds = time.perf_counter() - began
            plan = self._remember_remedies(plan, model)
            self._account.files = hashes.result()
            if model.prompts is not None:
                model.prompts.flush()  # the text encoder's hash is known by now
            self._save(place, plan, edit, picture, index, seconds)
            clock.image_done()

    def _load(self, plan: GenerationPlan, edit: Edit) -> LoadedModel:
        """The model of the plan, with the prompts of all pictures encoded."""
        began = time.perf_counter()
        self._watch.stage = "load"
        placed = plan.placement
        self._watch.tile = None if placed is None else placed.tile
        if placed is not None and (placed.engine != "direct" or len(placed.sentences) > 1):
            self._announce(Status(placed.words))  # something is done about memory
        orders = [settings.host_kwargs() | edit.prompt_kwargs for settings in self._alone]
        model = self._model.ensure(plan, lambda words: self._announce(Status(words)), orders)
        account = self._account
        account.kernels = [f"{k.layers} {k.packing} layers by {k.kernel}" for k in model.kernels]
        account.loras = [match.as_dict() for match in model.lora_matches]
        for match in account.loras:
            self._announce(Status(match_words(match)))
        account.seconds["text"] += model.text_seconds
        account.seconds["load"] += time.perf_counter() - began - model.text_seconds
        return model

    def _remember_remedies(self, plan: GenerationPlan, model: LoadedModel) -> GenerationPlan:
        """Keep in mind what the model had to do against bad numbers; returns the plan that begins with it."""
        self._account.safer = dict(model.processor.report.get("safer") or {})
        new = {name: words for name, words in self._account.safer.items() if name not in plan.safer}
        if not new:
            return plan
        why = {name: f"{words}: with others, numbers were bad on this device" for name, words in new.items()}
        self._remember(plan, why)
        plan = self._plan_again(plan.machine)
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
        return self._plan_again(Machine(plan.machine.device, Choice(wider, why)))

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

    def _draw_one(self, plan: GenerationPlan, model: LoadedModel, edit: Edit, index: int, clock: Clock) -> Image.Image:
        """Picture `index`, by as many drawings as the edit asks for."""
        self._account.begin_picture()
        drawing = PictureDrawing(
            plan=plan,
            processor=model.processor,
            settings=self._alone[index],
            number=index + 1,
            pictures=len(self._alone),
            passes=edit.passes,
            clock=clock,
            account=self._account,
            watch=self._watch,
            announce=self._announce,
            should_stop=self._should_stop,
        )
        return edit.draw(drawing.draw)

    def _save(
        self, place: OutputPlace, plan: GenerationPlan, edit: Edit, picture: Image.Image, index: int, seconds: float
    ) -> None:
        settings = self._alone[index]
        created = datetime.now().astimezone()
        names = {role: [f.path.name for f in plan.files if f.role == role and f.path] for role in WEIGHT_ROLES}
        lossy = self._account.lossy(settings.sampling)
        provenance = self._account.provenance(plan, lossy, self._watch.notes)
        record = build_record(
            settings.as_record() | edit.keep_sources(self._ctx.output_folder),
            plan.preset,
            model_filename=names["transformer"][0],
            modules=names["module"],
            generation_seconds=seconds,
            created=created,
            provenance=provenance | ({"pictures": edit.hashes} if edit.sources else {}),
        )
        path = place.path_for(settings, index, created)
        save_image(path, picture, record)
        done = ImageDone(path, settings.seed, record, index + 1, len(self._alone))
        self._images.append(done)
        self._announce(done)
        if lossy:
            self._announce(Status(f"Lossy: {lossy}"))

    def _stop_if_asked(self) -> None:
        if self._should_stop():
            raise Stopped

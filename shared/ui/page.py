"""The page's callbacks: component values in, what changes out, by component. None of them knows a model."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from shared.app.annotators import missing_megabytes
from shared.app.context import DEFAULT_PRESET
from shared.app.events import Downloading, Event, GenerationResult, ImageDone, StepDone
from shared.app.metadata import read_record
from shared.app.plan import beside_transformer, find_files, wanted_files
from shared.app.presets import Preset
from shared.app.settings import GenerationSettings
from shared.quant.errors import RunError, UserError
from shared.ui import result_panel
from shared.ui.edit_panel import EditPanel, control_preview, edit_inputs, edit_overrides, edit_updates
from shared.ui.fields import CUSTOM, fields_for, find_loras, overrides, preset_choices
from shared.ui.generate_panel import ComposePanel, SettingsPanel, form_updates, input_components, preset_note
from shared.ui.result_panel import ResultPanel
from shared.ui.sampling_panel import SamplingPanel, sampling_components, sampling_overrides, sampling_updates

if TYPE_CHECKING:
    from shared.app.context import AppContext


log = logging.getLogger(__name__)
_CANCELLED = "Cancelled. Pictures that were finished are kept."
Updates = dict[Any, Any]  # component -> its new value or gr.update(...)


@dataclass(slots=True)
class Easel:
    """Which browser page is being drawn for: one at a time, the others wait in gradio's queue."""

    page: str | None = None

    @contextmanager
    def taken_by(self, page: str | None) -> Iterator[None]:
        self.page = page
        try:
            yield
        finally:
            self.page = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The callbacks. Each gets component values and returns what changes, by component."""

    ctx: AppContext
    compose: ComposePanel
    settings: SettingsPanel
    sampling: SamplingPanel
    edit: EditPanel
    result: ResultPanel
    easel: Easel = field(default_factory=Easel)

    # ---- choosing a preset

    def opened(self) -> Updates:
        """Fill a page that was just opened: the presets of this moment, the last used one (or the demo) chosen."""
        known = self.ctx.presets.presets
        wanted = (self.ctx.config.get("last_model_type"), DEFAULT_PRESET, *known)
        preset_id = next((name for name in wanted if name in known), None)
        updates = self._chosen(preset_id)
        if preset_id is not None:
            updates[self.compose.prompt] = self._defaults(known[preset_id])[0].get("prompt") or ""
        return updates

    def preset_picked(self, preset_id: str) -> Updates:
        """Show the fields of another preset with its defaults; what the user typed as prompt stays."""
        try:
            return self._form(self.ctx.presets.get(preset_id))
        except UserError as error:  # its file was taken away and another page refreshed
            return {self.result.status: result_panel.failure(error)}

    def refreshed(self, preset_id: str | None) -> Updates:
        """Read the preset files again; the chosen preset stays chosen if it still exists."""
        try:
            known = self.ctx.refresh_presets().presets
        except UserError as error:  # a broken file among the program's own presets; the old ones stay in use
            return {self.compose.preset_note: preset_note("", problems=[str(error)])}
        return self._chosen(preset_id if preset_id in known else next(iter(known), None))

    # ---- drawing

    def asked(self, request: gr.Request) -> Updates:
        """The first answer to Generate, given at once even when another page is being drawn for."""
        must_wait = self.easel.page not in (None, request.session_hash)
        words = "Waiting for another page's pictures" if must_wait else "Starting"
        return {self.result.status: result_panel.working(words)} | self._buttons(busy=True)

    def draw(self, entered: Mapping[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Draw the pictures and show every event on the way; however it ends, the page can draw again."""
        try:
            preset, settings = self._order(entered)
            outcome = result_panel.note(" ".join(settings.notes))
            self._remember(preset)
            with self.easel.taken_by(request.session_hash):
                done = yield from self._events_shown(self.ctx.session.stream(preset, settings))
            if done.cancelled:
                outcome = result_panel.note(_CANCELLED)
        except UserError as error:
            outcome = result_panel.failure(error)
        except Exception as error:  # the page is the last to hear of a bug: it says so and stays usable
            log.exception("drawing failed")
            reason = f"{type(error).__name__}: {error}"
            outcome = result_panel.failure(RunError(f"Drawing failed: {reason}", "The terminal shows the details."))
        yield {self.result.status: outcome} | self._buttons(busy=False)

    def cancelled(self, request: gr.Request) -> Updates:
        """Stop this page's drawing within one step, or take it out of the queue; never another page's."""
        if self.easel.page == request.session_hash:
            self.ctx.session.cancel()
        return {self.result.status: result_panel.note(_CANCELLED)} | self._buttons(busy=False)

    # ---- single fields

    def size_picked(self, resolution: str) -> Any:
        """Open the width and height fields for a custom size."""
        return gr.update(visible=resolution == CUSTOM)

    def guidance_moved(self, preset_id: str, guidance_scale: float, nag_scale: float) -> Any:
        """Show the negative prompt as soon as guidance or NAG makes it count."""
        preset = self.ctx.presets.presets.get(preset_id)
        counts = preset is not None and fields_for(preset, {}).uses_negative_prompt(guidance_scale or 0, nag_scale or 1)
        return gr.update(visible=counts)

    def control_previewed(self, entered: Mapping[Any, Any]) -> Iterator[Updates]:
        """Show what the ControlNet will be shown, without drawing."""
        try:
            preset, settings = self._order(entered)
            if megabytes := missing_megabytes(self.ctx.files, settings.edit):
                words = f"Downloading {megabytes:.0f} MB for {settings.edit.control_preprocessor} pictures…"
                yield {self.result.status: result_panel.note(words)}
            seen = control_preview(preset, settings, self.ctx.output_folder, self.ctx.files)
        except UserError as error:
            yield {self.result.status: result_panel.failure(error)}
            return
        words = f"What the model sees: {seen.width} × {seen.height}."
        yield {
            self.result.status: result_panel.note(words),
            self.edit.preview_image: gr.update(value=seen, visible=True),
        }

    def seed_reused(self, seeds: list[int]) -> Any:
        """Put the seed of the last picture (the first of several) into the seed field."""
        return seeds[0] if seeds else gr.skip()

    def settings_restored(self, preset_id: str, picture: str | None) -> Updates:
        """Fill the form with the settings written inside a picture, and pick its preset if it is here."""
        try:
            if picture is None:
                raise UserError("There is no picture to take settings from.", "Drop one into the box first.")
            record = read_record(Path(picture))
            if record is None:
                raise UserError("This picture carries no settings.", "Only pictures saved with their settings do.")
            made_with = str(record.get("model_type", ""))
            preset = self.ctx.presets.presets.get(made_with) or self.ctx.presets.get(preset_id)
            values = GenerationSettings.build(preset, record).as_record()
        except UserError as error:
            return {self.result.status: result_panel.failure(error)}
        words = "The settings of this picture are in place."
        if preset.id != made_with:
            words += f" It was made with {made_with or 'another program'}, which is not among the models here."
        return {
            self.result.status: result_panel.note(words),
            self.compose.prompt: values["prompt"],
            **self._form(preset, values),
            self.compose.preset: gr.update(value=preset.id),
        }

    # ---- parts of the above

    def _chosen(self, preset_id: str | None) -> Updates:
        """The dropdown with the presets of this moment and the form of the chosen one."""
        choices = preset_choices(self.ctx.presets.grouped())
        updates: Updates = {self.compose.preset: gr.update(choices=choices, value=preset_id)}
        if preset_id is None:
            hint = "No preset was found. Put one into the folder defaults or finetunes and press Refresh."
            return updates | {self.compose.preset_note: preset_note(hint, problems=self.ctx.presets.problems)}
        return updates | self._form(self.ctx.presets.presets[preset_id])

    def _form(self, preset: Preset, values: Mapping[str, Any] | None = None) -> Updates:
        """Note and fields of a preset, filled with `values` or, without, with the user's defaults."""
        problems = list(self.ctx.presets.problems)
        if values is None:
            values, unread = self._defaults(preset)
            problems += unread
        files = find_files(self.ctx, wanted_files(self.ctx, preset))
        loras = find_loras(self.ctx.lora_folder(preset))
        fields = fields_for(preset, values, loras, has_error_lora=beside_transformer(files) is not None)
        missing = sum(file.path is None for file in files)
        memory, download = self._plan_words(preset, values)
        note = preset_note(
            preset.description, memory=memory, missing_files=missing, download=download, problems=problems
        )
        return {
            self.compose.preset_note: note,
            **form_updates(self.compose, self.settings, fields),
            **sampling_updates(self.sampling, preset, values),
            **edit_updates(self.edit, preset, values, self.ctx.output_folder),
        }

    def _plan_words(self, preset: Preset, values: Mapping[str, Any]) -> tuple[str, str]:
        """What a picture of these values takes and where its weights will live, and what is to be downloaded for it, in
        a line each; "" where nobody knows."""
        try:
            plan = self.ctx.session.plan(preset, GenerationSettings.build(preset, values))
        except UserError as error:  # such as a LoRA that is gone: drawing says so, the line says nothing of memory
            log.info("no memory plan for %s: %s", preset.id, error)
            return "", ""
        return plan.memory_words, plan.download.words if plan.download else ""

    def _defaults(self, preset: Preset) -> tuple[Mapping[str, Any], list[str]]:
        """The preset's settings under the user's own, and what of the user's cannot be used."""
        try:
            saved = self.ctx.saved_settings(preset)
            GenerationSettings.build(preset, saved)  # refuses a value that no field could show
            return {**preset.settings, **saved}, []
        except UserError as error:
            return preset.settings, [str(error)]

    def _remember(self, preset: Preset) -> None:
        """The next page starts with this preset; a folder that cannot be written is no reason not to draw."""
        try:
            self.ctx.save_config(last_model_type=preset.id)
        except UserError as error:
            log.warning("the last used model is not remembered: %s", error)

    def _order(self, entered: Mapping[Any, Any]) -> tuple[Preset, GenerationSettings]:
        """What the page asks for, checked. Raises UserError naming the field that is wrong."""
        values = {name: entered[part] for name, part in input_components(self.compose, self.settings).items()}
        if values["preset"] is None:
            raise UserError("No model is chosen.", "Pick one in the list at the top.")
        preset = self.ctx.presets.get(values["preset"])
        saved = self.ctx.saved_settings(preset)
        edits = {name: entered.get(part) for name, part in edit_inputs(self.edit).items()}
        asked = overrides(fields_for(preset, saved), values)
        samplings = {name: entered.get(part) for name, part in sampling_components(self.sampling).items()}
        asked |= sampling_overrides(samplings)
        asked |= edit_overrides(preset, edits, self.ctx.output_folder)
        return preset, GenerationSettings.build(preset, saved, asked)

    def _events_shown(
        self, events: Generator[Event, None, GenerationResult]
    ) -> Generator[Updates, None, GenerationResult]:
        """Each event as what it changes on the page; returns what the session returns."""
        images: list[ImageDone] = []
        began = time.monotonic()
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                result: GenerationResult = end.value
                return result
            yield self._shown(event, images, seconds=time.monotonic() - began)

    def _shown(self, event: Event, images: list[ImageDone], *, seconds: float) -> Updates:
        """What one event changes on the page; a finished picture is added to `images`."""
        status = self.result.status
        if isinstance(event, StepDone):
            return {status: result_panel.step_status(event)}
        if isinstance(event, Downloading):
            return {status: result_panel.download_status(event.progress)}
        if isinstance(event, ImageDone):
            images.append(event)
            return {
                self.result.gallery: result_panel.pictures(images),
                self.result.info: result_panel.summary(images, seconds),
                self.result.seeds: [image.seed for image in images],
            }
        return {status: result_panel.working(event.text)}

    def _buttons(self, *, busy: bool) -> Updates:
        """Generate while idle, Cancel in its place while drawing or waiting."""
        return {
            self.compose.generate: gr.update(visible=not busy),
            self.compose.cancel: gr.update(visible=busy),
        }

"""Connect the panels' events to the page's callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from shared.ui.edit_panel import edit_inputs, edit_outputs
from shared.ui.fields import RANDOM_SEED
from shared.ui.generate_panel import form_components, input_components
from shared.ui.page import Page
from shared.ui.sampling_panel import sampling_components

if TYPE_CHECKING:
    pass


def wire(app: gr.Blocks, page: Page) -> None:
    """Attach every event of the page."""
    compose, settings, sampling = page.compose, page.settings, page.sampling
    edit, result = page.edit, page.result
    of_sampling = sampling_components(sampling).values()
    form = [compose.preset_note, *form_components(compose, settings), *of_sampling, *edit_outputs(edit)]
    inputs = {*input_components(compose, settings).values(), *of_sampling, *edit_inputs(edit).values()}
    buttons = [compose.generate, compose.cancel]
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    at_once: dict[str, Any] = {**quiet, "queue": False}  # answered while pictures are being drawn

    app.load(page.opened, None, [compose.preset, compose.prompt, *form], **at_once)
    compose.preset.input(page.preset_picked, compose.preset, [result.status, *form], **at_once)
    compose.refresh.click(page.refreshed, compose.preset, [compose.preset, *form], **at_once)

    drawing = (
        gr.on([compose.generate.click, compose.prompt.submit], page.asked, None, [result.status, *buttons], **at_once)
        .then(
            page.draw, inputs,
            [result.status, result.gallery, result.info, result.seeds, *buttons], concurrency_limit=1, **quiet,
        )
    )  # fmt: skip
    compose.cancel.click(page.cancelled, None, [result.status, *buttons], cancels=[drawing], **at_once)

    edit.preview.click(page.control_previewed, inputs, [result.status, edit.preview_image], **at_once)
    settings.resolution.input(page.size_picked, settings.resolution, settings.custom_size, **at_once)
    gr.on(
        [settings.guidance_scale.change, settings.NAG_scale.change], page.guidance_moved,
        [compose.preset, settings.guidance_scale, settings.NAG_scale], compose.negative_prompt, **at_once,
    )  # fmt: skip
    settings.random_seed.click(lambda: RANDOM_SEED, None, settings.seed, **at_once)
    settings.reuse_seed.click(page.seed_reused, result.seeds, settings.seed, **at_once)
    settings.use_settings.click(
        page.settings_restored, [compose.preset, settings.picture],
        [result.status, compose.preset, compose.prompt, *form], **at_once,
    )  # fmt: skip

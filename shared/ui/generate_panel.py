"""The left side of the page: what to draw (model, prompt, buttons) and how (size, steps, seed, the rest)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component

from shared.ui.fields import CUSTOM, RANDOM_SEED, Fields

STEPS_SHOWN = 50  # end of the slider: more brings nothing a person can see; a picture's own settings may exceed it


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposePanel:
    """What to draw and the buttons that start and stop it."""

    preset: gr.Dropdown
    refresh: gr.Button
    preset_note: gr.HTML
    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    generate: gr.Button
    cancel: gr.Button


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsPanel:
    """How to draw it. The attribute names of the inputs are the host's settings keys."""

    resolution: gr.Dropdown
    width: gr.Number
    height: gr.Number
    custom_size: gr.Row
    num_inference_steps: gr.Slider
    guidance_scale: gr.Slider
    seed: gr.Number
    random_seed: gr.Button
    reuse_seed: gr.Button
    batch_size: gr.Slider
    lora_group: gr.Accordion
    activated_loras: gr.Dropdown
    loras_multipliers: gr.Textbox
    error_lora_strength: gr.Slider
    advanced: gr.Accordion
    flow_shift: gr.Slider
    sample_solver: gr.Dropdown
    nag_group: gr.Column
    NAG_scale: gr.Slider
    NAG_tau: gr.Slider
    NAG_alpha: gr.Slider
    picture: gr.Image
    use_settings: gr.Button


def build_compose_panel() -> ComposePanel:
    """Lay out model, prompts and buttons; their choices and values arrive when a page opens."""
    with gr.Row(elem_id="model-row", equal_height=False):
        preset = gr.Dropdown(label="Model", elem_id="preset", choices=[], value=None, scale=1)
        refresh = gr.Button("Refresh", elem_id="refresh", size="sm", min_width=72, scale=0)
    preset_note = gr.HTML(elem_id="preset-note")
    prompt = gr.Textbox(
        label="Prompt", elem_id="prompt", lines=3, max_lines=12,
        placeholder="Describe the picture. Shift + Enter draws it.",
    )  # fmt: skip
    negative_prompt = gr.Textbox(
        label="Negative prompt", elem_id="negative-prompt", lines=2, max_lines=6, visible=False,
        placeholder="What the picture should stay away from",
    )  # fmt: skip
    generate = gr.Button("Generate", elem_id="generate", variant="primary", size="lg")
    cancel = gr.Button("Cancel", elem_id="cancel", variant="stop", size="lg", visible=False)
    return ComposePanel(
        preset=preset, refresh=refresh, preset_note=preset_note, prompt=prompt, negative_prompt=negative_prompt,
        generate=generate, cancel=cancel,
    )  # fmt: skip


def build_settings_panel() -> SettingsPanel:
    """Lay out the settings; `settings_updates` fills them for a preset."""
    resolution = gr.Dropdown(label="Size", elem_id="resolution", choices=[], value=None)
    with gr.Row(elem_id="custom-size", visible=False) as custom_size:
        width = gr.Number(label="Width", elem_id="width", precision=0, minimum=16, step=16, min_width=100)
        height = gr.Number(label="Height", elem_id="height", precision=0, minimum=16, step=16, min_width=100)
    num_inference_steps = gr.Slider(1, STEPS_SHOWN, value=8, step=1, label="Steps", buttons=[], elem_id="steps")
    guidance_scale = gr.Slider(0, 20, step=0.1, label="Guidance", buttons=[], elem_id="guidance", visible=False,
                               info="How strictly the picture follows the prompt; 0 turns it off.")  # fmt: skip
    with gr.Row(elem_id="seed-row", equal_height=False):
        seed = gr.Number(label="Seed", elem_id="seed", value=RANDOM_SEED, precision=0, minimum=RANDOM_SEED,
                         info="-1: always a new one", scale=1, min_width=120)  # fmt: skip
        random_seed = gr.Button("Random", elem_id="random-seed", size="sm", min_width=72, scale=0)
        reuse_seed = gr.Button("Reuse last", elem_id="reuse-seed", size="sm", min_width=72, scale=0)
    batch_size = gr.Slider(1, 16, value=1, step=1, label="Pictures", buttons=[], elem_id="batch-size")
    with gr.Accordion("LoRA", elem_id="loras", open=False, visible=False) as lora_group:
        activated_loras = gr.Dropdown(label="Files", elem_id="lora-files", choices=[], value=[], multiselect=True)
        loras_multipliers = gr.Textbox(label="Strengths", elem_id="lora-strengths", placeholder="1 0.8",
                                       info="One per file, in the same order; left out means 1. "
                                            "1,0.5 changes over the steps, 1;0 by halves.")  # fmt: skip
        error_lora_strength = gr.Slider(
            0, 2, value=1, step=0.05, label="Error correction", elem_id="error-lora", buttons=[], visible=False,
            info="Strength of the LoRA beside the model's file that gives back what packing took; 0 turns it off.",
        )  # fmt: skip
    with gr.Accordion("Advanced", elem_id="advanced", open=False, visible=False) as advanced:
        sample_solver = gr.Dropdown(label="Sampler", elem_id="sampler", choices=[], value=None, visible=False)
        flow_shift = gr.Slider(0.5, 12, value=3, step=0.1, label="Flow shift", elem_id="flow-shift", visible=False,
                               info="Above 1, more of the steps go to the composition.", buttons=[])  # fmt: skip
        with gr.Column(elem_id="nag", visible=False) as nag_group:
            nag_scale = gr.Slider(1, 20, value=1, step=0.25, label="NAG scale", elem_id="nag-scale", buttons=[],
                                  info="Above 1, the negative prompt works without guidance.")  # fmt: skip
            nag_tau = gr.Slider(1, 10, value=3.5, step=0.1, label="NAG tau", elem_id="nag-tau", buttons=[])
            nag_alpha = gr.Slider(0, 1, value=0.5, step=0.05, label="NAG alpha", elem_id="nag-alpha", buttons=[])
    with gr.Accordion("Start from a picture's settings", elem_id="restore", open=False):
        # image_mode=None keeps the uploaded file as it is; converting it would drop the settings inside.
        picture = gr.Image(show_label=False, elem_id="picture", type="filepath", image_mode=None, height=200,
                           sources=["upload", "clipboard"], placeholder="Drop a picture made here")  # fmt: skip
        use_settings = gr.Button("Use its settings", elem_id="use-settings", size="md")
    return SettingsPanel(
        resolution=resolution, width=width, height=height, custom_size=custom_size,
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
        seed=seed, random_seed=random_seed, reuse_seed=reuse_seed, batch_size=batch_size,
        lora_group=lora_group, activated_loras=activated_loras, loras_multipliers=loras_multipliers,
        error_lora_strength=error_lora_strength,
        advanced=advanced, flow_shift=flow_shift, sample_solver=sample_solver,
        nag_group=nag_group, NAG_scale=nag_scale, NAG_tau=nag_tau, NAG_alpha=nag_alpha,
        picture=picture, use_settings=use_settings,
    )  # fmt: skip


def input_components(compose: ComposePanel, settings: SettingsPanel) -> dict[str, Component]:
    """The components a generation reads, by settings key (plus width and height of a custom size)."""
    keys = (
        "resolution", "width", "height", "num_inference_steps", "guidance_scale", "seed", "batch_size",
        "activated_loras", "loras_multipliers", "error_lora_strength",
        "flow_shift", "sample_solver", "NAG_scale", "NAG_tau", "NAG_alpha",
    )  # fmt: skip
    of_settings = {key: getattr(settings, key) for key in keys}
    return {
        "preset": compose.preset,
        "prompt": compose.prompt,
        "negative_prompt": compose.negative_prompt,
        **of_settings,
    }


def form_components(compose: ComposePanel, settings: SettingsPanel) -> list[gr.blocks.Block]:
    """Every component that `form_updates` may change."""
    of_settings = [getattr(settings, field.name) for field in fields(settings)]
    return [compose.negative_prompt, *of_settings]


def form_updates(compose: ComposePanel, settings: SettingsPanel, form: Fields) -> dict[gr.blocks.Block, Any]:
    """Show the fields of a preset with their choices and values, and hide those its model does not know."""
    return {
        compose.negative_prompt: gr.update(
            value=form.negative_prompt, visible=form.uses_negative_prompt(form.guidance_scale, form.NAG_scale)
        ),
        settings.resolution: gr.update(choices=list(form.resolutions), value=form.resolution),
        settings.custom_size: gr.update(visible=form.resolution == CUSTOM),
        settings.width: form.width,
        settings.height: form.height,
        settings.num_inference_steps: gr.update(
            value=form.num_inference_steps,
            maximum=max(STEPS_SHOWN, form.num_inference_steps),
            interactive=not form.steps_locked,
        ),
        settings.guidance_scale: gr.update(value=form.guidance_scale, visible=form.has_guidance),
        settings.seed: form.seed,
        settings.batch_size: gr.update(
            value=min(form.batch_size, form.batch_max), maximum=form.batch_max, visible=form.batch_max > 1
        ),
        settings.lora_group: gr.update(visible=bool(form.loras) or form.has_error_lora),
        settings.activated_loras: gr.update(choices=list(form.loras), value=list(form.activated_loras)),
        settings.loras_multipliers: form.loras_multipliers,
        settings.error_lora_strength: gr.update(value=form.error_lora_strength, visible=form.has_error_lora),
        settings.advanced: gr.update(visible=form.has_flow_shift or form.has_nag or bool(form.solvers)),
        settings.flow_shift: gr.update(value=form.flow_shift, visible=form.has_flow_shift),
        settings.sample_solver: gr.update(
            choices=list(form.solvers), value=form.sample_solver if form.solvers else None, visible=bool(form.solvers)
        ),
        settings.nag_group: gr.update(visible=form.has_nag),
        settings.NAG_scale: form.NAG_scale,
        settings.NAG_tau: form.NAG_tau,
        settings.NAG_alpha: form.NAG_alpha,
    }


def preset_note(
    description: str, *, memory: str = "", missing_files: int = 0, download: str = "", problems: Sequence[str] = ()
) -> str:
    """Markup under the model field: what the preset is, what it takes, what it must fetch, and preset files that cannot
    be used."""
    lines = [f"<p>{escape(description)}</p>"] if description else []
    if memory:
        lines.append(f'<p class="memory">{escape(memory)}</p>')
    if missing_files:
        files = "1 file" if missing_files == 1 else f"{missing_files} files"
        lines.append(
            f'<p class="fetch">The first picture has to wait for a download of {escape(download or files)}.</p>'
        )
    lines += [f'<p class="problem">{escape(problem)}</p>' for problem in problems]
    return "".join(lines)

"""The part of the page for how noise becomes the picture, and how the prompt's text is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from shared.app.presets import Preset
from shared.app.prompts import MODES, mode_of
from shared.app.sampling_settings import MAX_STEP_CACHE
from shared.app.schema import SETTING_KEYS

_SCHEDULES = (
    ("The sampler's own", ""),
    ("Simple: even, moved by the shift", "simple"),
    ("Beta: more at both ends", "beta"),
    ("Linear: even", "linear"),
)
_MODE_WORDS = ("One prompt", "One prompt per line", "One prompt per paragraph")
_LONG_PROMPTS = (("Keep whole, up to 1504 tokens", "keep"), ("Cut to 512 tokens", "cut"), ("Refuse", "refuse"))
_PRECISIONS = (("Fast", "fast"), ("Exact: rounded as the reference does", "exact"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPanel:
    """The components, each named by its settings key."""

    schedule: gr.Dropdown
    sigmas: gr.Textbox
    variation_strength: gr.Slider
    variation_seed: gr.Number
    diversity: gr.Slider
    diversity_end: gr.Slider
    multi_prompts_gen_type: gr.Dropdown
    long_prompt: gr.Dropdown
    precision: gr.Dropdown
    step_cache: gr.Slider


def build_sampling_panel() -> SamplingPanel:
    """Lay the panel out, closed; `sampling_updates` fills it for a preset."""
    plain: dict[str, Any] = {"buttons": []}
    usual = {name: key.default for name, key in SETTING_KEYS.items()}
    with gr.Accordion("Noise and prompt", elem_id="sampling", open=False):
        with gr.Row():
            variation_strength = gr.Slider(
                0, 1, value=0, step=0.01, label="Variation", elem_id="variation-strength",
                info="Above 0: pictures near the one of the seed.", **plain,
            )  # fmt: skip
            variation_seed = gr.Number(
                label="Variation seed", elem_id="variation-seed", value=-1, precision=0, minimum=-1,
                info="-1: always a new one",
            )  # fmt: skip
        with gr.Row():
            diversity = gr.Slider(
                0, 2, value=0, step=0.05, label="Diversity", elem_id="diversity",
                info="Above 0: other seeds give other compositions.", **plain,
            )  # fmt: skip
            diversity_end = gr.Slider(
                0, 1, value=usual["diversity_end"], step=0.05, label="In this share of the steps",
                elem_id="diversity-end", **plain,
            )  # fmt: skip
        schedule = gr.Dropdown(label="Schedule", elem_id="schedule", choices=list(_SCHEDULES), value="")
        sigmas = gr.Textbox(
            label="Noise levels of your own", elem_id="sigmas", placeholder="1, 0.9, 0.75, 0.5",
            info="Instead of a schedule; as many as there are to be steps.",
        )  # fmt: skip
        multi_prompts_gen_type = gr.Dropdown(
            label="The prompt's text is", elem_id="prompt-mode",
            choices=list(zip(_MODE_WORDS, MODES, strict=True)), value=usual["multi_prompts_gen_type"],
        )  # fmt: skip
        long_prompt = gr.Dropdown(
            label="A prompt of more than 512 tokens", elem_id="long-prompt", choices=list(_LONG_PROMPTS),
            value=usual["long_prompt"],
        )  # fmt: skip
        precision = gr.Dropdown(
            label="Precision", elem_id="precision", choices=list(_PRECISIONS), value=usual["precision"],
        )  # fmt: skip
        step_cache = gr.Slider(
            0, MAX_STEP_CACHE, value=usual["step_cache"], step=0.01, label="Step cache (lossy)", elem_id="step-cache",
            info="Above 0: steps that change little are not computed. Another picture, sooner.", **plain,
        )  # fmt: skip
    return SamplingPanel(
        schedule=schedule, sigmas=sigmas, variation_strength=variation_strength, variation_seed=variation_seed,
        diversity=diversity, diversity_end=diversity_end, multi_prompts_gen_type=multi_prompts_gen_type,
        long_prompt=long_prompt, precision=precision, step_cache=step_cache,
    )  # fmt: skip


def sampling_components(panel: SamplingPanel) -> dict[str, Any]:
    """Every component by its settings key; all are read by a generation, and all follow the preset."""
    return {field.name: getattr(panel, field.name) for field in fields(panel)}


def sampling_updates(panel: SamplingPanel, preset: Preset, values: Mapping[str, Any]) -> dict[Any, Any]:
    """Fill the panel with `values` (settings, or the record of a picture) over the preset's own and the usual ones."""
    settings = {**preset.settings, **values}
    updates: dict[Any, Any] = {}
    for key, component in sampling_components(panel).items():
        value = settings.get(key)
        value = SETTING_KEYS[key].default if value is None else value
        if key == "sigmas":
            value = ", ".join(f"{number:g}" for number in value)
        elif key == "multi_prompts_gen_type":
            value = mode_of(value)
        updates[component] = value
    return updates


def sampling_overrides(entered: Mapping[str, Any]) -> dict[str, Any]:
    """What the user entered, under the settings keys; a field left empty is left out."""
    return {key: value for key, value in entered.items() if value is not None}

"""What tells the Z-Image architectures apart: one row each, read by the handler.

Values are those of Wan2GP's own Z-Image handler (12.60, commit 8681e9f7), so that either program can take the
other's presets and settings. What is built has its checkpoint's sizes; those here are for plans made before
the files are on the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FAMILY = "z_image"
FAMILY_LABEL = "Z-Image"
FAMILY_ORDER = 1120  # sort key among the host's families, low first

REPOSITORY = "DeepBeepMeep/Z-Image"
TEXT_ENCODER_FOLDER = "Qwen3"
TEXT_ENCODER_FILES = ("qwen3_bf16.safetensors", "qwen3_quanto_bf16_int8.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "config.json", "merges.txt")
VAE_FILE = "ZImageTurbo_VAE_bf16.safetensors"
VAE_CONFIG_FILE = "ZImageTurbo_VAE_bf16_config.json"
SCHEDULER_CONFIG_FILE = "ZImageTurbo_scheduler_config.json"

# The published modules in numbers, for plans made before their files are here: the 6B transformer (30 layers, 2 + 2
# refiners), Qwen3-4B, Flux's VAE. The keys are the fields of the host's ModuleShapes.
PUBLISHED_SHAPES: Mapping[str, Mapping[str, int]] = {
    "transformer": {
        "numbers": 6_154_908_736,
        "outside": 11_852_352,
        "unpacked": 727_598_656,  # all but the 30 layers, in most packed files
        "blocks": 34,
        "width": 3840,
        "hidden": 10240,
        "products": 34 * (4 * 3840 * 3840 + 3 * 3840 * 10240),
        "largest": 3 * 3840 * 3840,
    },
    "text_encoder": {
        "numbers": 4_022_468_096,
        "outside": 388_958_720,
        "unpacked": 388_958_720,  # the table of words, and a norm
        "table": 388_956_160,
        "blocks": 36,
        "width": 2560,
        "hidden": 9728,
        "products": 36 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728),
        "largest": 2560 * 9728,
    },
    "vae": {"numbers": 83_819_683, "channels": 256},
}

_TURBO_DEFAULTS: Mapping[str, Any] = {
    "guidance_scale": 0,
    "num_inference_steps": 8,
    "NAG_scale": 1.0,
    "NAG_tau": 3.5,
    "NAG_alpha": 0.5,
}
_CONTROL_DEFAULTS: Mapping[str, Any] = {**_TURBO_DEFAULTS, "control_net_weight": 0.75}

# Letters of the host's video_prompt_type: V control image, P pose, D depth, E edges, A mask, N its outside.
_CONTROL_DEF: Mapping[str, Any] = {
    "control_net_weight_name": "Control",
    "control_net_weight_size": 1,
    "guide_preprocessing": {
        "selection": ["", "PV", "DV", "EV", "V"],
        "labels": {"V": "Use Z-Image Raw Format"},
    },
    "mask_preprocessing": {"selection": [""], "visible": False},
}
_CONTROL_WITH_MASK_DEF: Mapping[str, Any] = {
    **_CONTROL_DEF,
    "mask_preprocessing": {"selection": ["", "A", "NA"], "visible": False},
    "parent_model_type": "z_image_control",
    "inpaint_support": True,
    "inpaint_video_prompt_type": "VA",
}
# Letter I of video_prompt_type: there are reference pictures, each shown whole.
_OMNI_DEF: Mapping[str, Any] = {
    "image_ref_choices": {
        "choices": [("None", ""), ("Reference Pictures", "I")],
        "letters_filter": "I",
        "default": "I",
    },
    "no_background_removal": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One architecture id and how it differs from its sisters.

    guidance_max_phases: 1 if made for classifier-free guidance, 0 if guidance is distilled into the weights.
    flow_shift: the user may set the schedule's shift. nag: normalized attention guidance is offered.
    equivalent_to: the architecture whose settings fit this one and back (None: only itself).
    extra_def: further keys for the host's model definition.
    """

    architecture: str
    guidance_max_phases: int = 0
    flow_shift: bool = False
    nag: bool = False
    equivalent_to: str | None = None
    default_settings: Mapping[str, Any] = field(default_factory=dict)
    extra_def: Mapping[str, Any] = field(default_factory=dict)


# Our own key. Wan2GP's changelog tells of black frames with SageAttention 1 and of banding with 2 on this model.
_BASE_DEF: Mapping[str, Any] = {"unsafe_attention": ["sage", "sage2"]}

_ROWS = (
    # "guidance_optional" is our own: the page offers guidance, which Turbo can do without.
    Variant(architecture="z_image", nag=True, default_settings=_TURBO_DEFAULTS, extra_def={"guidance_optional": True}),
    Variant(
        architecture="z_image_base",
        guidance_max_phases=1,
        flow_shift=True,
        equivalent_to="z_image",
        default_settings={"guidance_scale": 4, "num_inference_steps": 30, "flow_shift": 6.0},
        extra_def=_BASE_DEF,
    ),
    Variant(
        architecture="z_image_control",
        default_settings=_CONTROL_DEFAULTS,
        extra_def=_CONTROL_DEF,
    ),
    Variant(
        architecture="z_image_control2",
        default_settings=_CONTROL_DEFAULTS,
        extra_def=_CONTROL_WITH_MASK_DEF,
    ),
    Variant(
        architecture="z_image_control2_1",
        equivalent_to="z_image_control2",
        default_settings=_CONTROL_DEFAULTS,
        extra_def=_CONTROL_WITH_MASK_DEF,
    ),
    # Ours alone: no weights are published and Wan2GP has no such architecture. Defaults are Base's until there are.
    Variant(
        architecture="z_image_omni",
        guidance_max_phases=1,
        flow_shift=True,
        default_settings={"guidance_scale": 4, "num_inference_steps": 30, "flow_shift": 6.0},
        extra_def={**_BASE_DEF, **_OMNI_DEF},
    ),
)

VARIANTS: Mapping[str, Variant] = {row.architecture: row for row in _ROWS}

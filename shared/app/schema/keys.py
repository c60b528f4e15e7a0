"""The known keys of presets and settings: kind, meaning and usual value of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.app.schema.kinds import (
    ATTENTION,
    CONFIGS,
    DTYPE,
    FLAG,
    GIGABYTES,
    LIMIT,
    LINKS,
    MODULES,
    MULTIPLIERS,
    NUMBER,
    NUMBERS,
    PROMPT_MODE,
    SCORER,
    TEXT,
    TEXT_LIST,
    WHOLE,
    Kind,
)

SETTINGS_VERSION = 2.74  # schema of Wan2GP 12.60, whose key names are used


@dataclass(frozen=True, slots=True)
class Key:
    """A known key: kind of value, meaning in one line, and value when nothing else is said."""

    kind: Kind
    meaning: str
    default: Any = None


MODEL_KEYS: Mapping[str, Key] = {
    "name": Key(TEXT, "what the preset is called in lists"),
    "architecture": Key(TEXT, "which architecture the weights are for (required)"),
    "description": Key(TEXT, "one or two sentences for the person who chooses"),
    "URLs": Key(LINKS, "where the transformer's weights are: alternatives of one file, the plain one first"),
    "modules": Key(MODULES, "further weight files that belong to the transformer (ControlNet)"),
    "text_encoder_URLs": Key(LINKS, "text encoder weights instead of the family's"),
    "text_encoder_folder": Key(TEXT, "folder of the text encoder's tokenizer and configuration"),
    "VAE_URLs": Key(LINKS, "VAE weights instead of the family's"),
    "gigabytes": Key(GIGABYTES, "what its files weigh, for the plan before a download; see below"),
    "preload_URLs": Key(LINKS, "files to download in any case"),
    "loras": Key(LINKS, "LoRA files that always apply, before the user's"),
    "loras_multipliers": Key(MULTIPLIERS, "their strengths, in the same order (1 where missing)"),
    "attention": Key(ATTENTION, "attention modes for certain GPUs; the first condition that holds is used"),
    "unsafe_attention": Key(TEXT_LIST, "attention modes that draw this model wrong and are refused"),
    "dtype": Key(DTYPE, "number type to compute in"),
    "configs": Key(CONFIGS, "named sets of model keys that replace those above when chosen"),
    "visible": Key(FLAG, "false: usable by id, but not listed", True),
    "scorer": Key(SCORER, "reads what this model draws; `wgp.py compare` takes its prompts and its verdicts"),
    "guidance_optional": Key(FLAG, "offer guidance on the page though the model does without", False),
    "unified_solver": Key(FLAG, "weights distilled for the few-step unified solver (TwinFlow)", False),
}

SETTING_KEYS: Mapping[str, Key] = {
    "prompt": Key(TEXT, "what to draw; may hold notes, macros, choices and wildcards (docs/prompts.md)", ""),
    "multi_prompts_gen_type": Key(
        PROMPT_MODE, "what of the text is one prompt: FG all of it, G each line, PG each paragraph", "FG"
    ),
    "long_prompt": Key(TEXT, "a prompt of more than 512 tokens: keep (up to 1504), cut or refuse", "keep"),
    "negative_prompt": Key(TEXT, "what to avoid; works with guidance or NAG", ""),
    "resolution": Key(TEXT, 'size in pixels, "WIDTHxHEIGHT", both multiples of 16', "1024x1024"),
    "num_inference_steps": Key(WHOLE, "steps of the sampler; most take one pass through the transformer each", 8),
    "guidance_scale": Key(NUMBER, "classifier-free guidance: pos + scale * (pos - neg); 0 is off", 0.0),
    "seed": Key(WHOLE, "start of the noise; image i of a batch uses seed + i; -1 draws one", -1),
    "batch_size": Key(WHOLE, "number of images, of each prompt", 1),
    "variation_strength": Key(NUMBER, "how far the noise is turned towards the variation seed's, 0 to 1", 0.0),
    "variation_seed": Key(
        WHOLE, "the other noise's seed; image i of a batch uses it + i and the same seed; -1 draws one", -1
    ),
    "diversity": Key(NUMBER, "noise on the prompt in the first steps, so that seeds differ more; 0 is off", 0.0),
    "diversity_end": Key(NUMBER, "share of the steps that have it, 0 to 1", 0.25),
    "precision": Key(
        TEXT, "fast, or exact: bfloat16 numbers rounded wherever the reference implementation rounds them", "fast"
    ),
    "step_cache": Key(
        NUMBER, "LOSSY: a step's answer is used again up to this error, as a share; 0 is off, 0.1 careful", 0.0
    ),
    "flow_shift": Key(NUMBER, "moves the schedule towards high noise; above 0", None),
    "sample_solver": Key(TEXT, "sampler; empty for the model's own", ""),
    "schedule": Key(TEXT, "where the steps stop: simple, beta or linear; empty for the sampler's own", ""),
    "sigmas": Key(NUMBERS, "noise levels of one's own, falling from 1; their number is that of the steps", ()),
    "NAG_scale": Key(NUMBER, "normalized attention guidance; 1 is off", 1.0),
    "NAG_tau": Key(NUMBER, "its limit on the ratio of norms", 3.5),
    "NAG_alpha": Key(NUMBER, "its blend with the unguided features, 0 to 1", 0.5),
    "error_lora_strength": Key(
        NUMBER, "strength of the error-correction LoRA beside a packed model's file, if there is one; 0 is off", 1.0
    ),
    "denoising_strength": Key(NUMBER, "share of the schedule that is run on a given picture, 0 to 1", 1.0),
    "image_start": Key(TEXT, "picture to change: image to image, inpainting, outpainting", ""),
    "image_mask": Key(TEXT, "mask over it, white is repainted", ""),
    "mask_expand": Key(WHOLE, "pixels by which the mask grows, below 0 shrinks", 0),
    "mask_feather": Key(WHOLE, "pixels over which its edge fades out, beyond that", 8),
    "inpaint_area": Key(TEXT, '"masked" draws the surroundings of the mask at the resolution, "whole" all', "masked"),
    "image_fit": Key(TEXT, 'pictures of another shape: "crop", "pad" or "stretch"', "crop"),
    "outpaint": Key(TEXT, 'margins to draw around the picture, in pixels: "left=128,bottom=64" or "all=64"', ""),
    "hires_scale": Key(NUMBER, "a second pass at so many times the size; 1 is none", 1.0),
    "hires_strength": Key(NUMBER, "denoising strength of the second pass, 0 to 1", 0.5),
    "tile_scale": Key(NUMBER, "enlarge the picture so many times, drawing it tile by tile; 1 does not", 1.0),
    "image_guide": Key(TEXT, "control image, for presets with a ControlNet", ""),
    "image_refs": Key(TEXT_LIST, "pictures to go by, for Omni and Edit models", ()),
    "control_preprocessor": Key(TEXT, "what the control image is turned into: raw, canny, ...", None),
    "control_net_weight": Key(NUMBER, "strength of the control image", 1.0),
    "control_start": Key(NUMBER, "share of the steps after which the control image counts, 0 to 1", 0.0),
    "control_end": Key(NUMBER, "share of the steps after which it no longer does, 0 to 1", 1.0),
    "activated_loras": Key(TEXT_LIST, "LoRA files, relative to the LoRA folder", ()),
    "loras_multipliers": Key(MULTIPLIERS, "their strengths, separated by spaces (1 where missing)", ""),
    "VAE_tile_size": Key(WHOLE, "side of a decoding tile in latent cells (8 pixels); 0 decodes in one piece", None),
    "cfg_normalization": Key(
        LIMIT, "bound on the guided prediction's norm, as a multiple of the unguided; 0 is off", 0.0
    ),
    "cfg_truncation": Key(NUMBER, "guidance stops above this share of the schedule, 0 to 1", 1.0),
}

# Of Wan2GP's model keys, those whose absence here changes the result, so that their presence is worth a note.
WITHOUT_EFFECT = {
    "URLs2": "weights for a second phase are not used",
    "auto_quantize": "weights are used as they are stored",
    "compile": "modules are not compiled",
    "source": "weights are read in their original naming through URLs",
    "source2": "weights are read in their original naming through URLs",
    "module_source": "modules are read in their original naming through modules",
    "module_source2": "modules are read in their original naming through modules",
}

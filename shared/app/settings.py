"""Generation settings: a preset's defaults, what was saved and what is asked for, checked, as one value."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shared import samplers
from shared.app import prompts
from shared.app.edit_settings import EditSettings
from shared.app.host_keys import HOST_SETTING_KEYS
from shared.app.loras import is_strength
from shared.app.presets import LoraChoice, Preset
from shared.app.sampling_settings import MAX_DRAWN_SEED, MAX_SEED, SamplingSettings, known_name
from shared.app.schema import SETTING_KEYS, require_setting, unknown_key
from shared.app.setting_checks import (
    block_of,
    flow_shift_of,
    ineffective,
    lora_choices,
    nag_of,
    parse_resolution,
    require_config,
    require_range,
    require_values,
    tile_size_of,
    usable_saved,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """Everything that decides the pictures, in range. The seed is never -1 here.

    prompt, negative_prompt: as written; `prompts.pictures` makes the settings of each picture out of them, with the
    original text as prompt_template if it is another.
    width, height: pixels. VAE_tile_size: latent cells of 8 pixels; None (as for flow_shift) is the model's
    choice. extra: host keys that are carried along unused. notes: what was asked for and has no effect.
    """

    prompt: str
    negative_prompt: str = ""
    multi_prompts_gen_type: str = prompts.WHOLE
    prompt_template: str = ""
    width: int = 1024
    height: int = 1024
    num_inference_steps: int = 8
    guidance_scale: float = 0.0
    seed: int
    batch_size: int = 1
    flow_shift: float | None = None
    sample_solver: str = ""
    NAG_scale: float = 1.0
    NAG_tau: float = 3.5
    NAG_alpha: float = 0.5
    denoising_strength: float = 1.0
    control_net_weight: float = 1.0
    loras: tuple[LoraChoice, ...] = ()
    error_lora_strength: float = 1.0
    VAE_tile_size: int | None = None
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    edit: EditSettings = field(default_factory=EditSettings)
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def build(
        cls,
        preset: Preset,
        saved: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> GenerationSettings:
        """Settings from the preset's defaults, `saved` (a settings file, a picture's record) and `overrides`, in turn.

        Keys are the host's ("resolution": "1024x768"). Values may be texts where numbers are wanted; None means not
        set. A seed of -1 is drawn here. Raises UserError naming the key, what it got and what is allowed.
        """
        asked = {key: value for key, value in (overrides or {}).items() if value is not None}
        for key in asked:
            if key not in SETTING_KEYS and key not in HOST_SETTING_KEYS:
                raise unknown_key("settings", key, frozenset(SETTING_KEYS) | HOST_SETTING_KEYS)
        found, notes = usable_saved(preset, saved or {})
        merged = {**preset.settings, **found, **asked}
        require_config(preset, asked.get("config"))
        unused = HOST_SETTING_KEYS - {"config"}
        notes += [f'"{key}" is a setting of Wan2GP without effect here.' for key in asked if key in unused]
        values = {
            key: require_setting("settings", key, merged[key]) for key in SETTING_KEYS if merged.get(key) is not None
        }
        require_values(preset, values)
        width, height = parse_resolution(values["resolution"], block_of(preset.model_def))
        batch_size = int(values["batch_size"])
        seed = int(values["seed"])
        if seed < 0:
            seed = random.SystemRandom().randint(0, MAX_DRAWN_SEED)
        require_range("seed", seed + batch_size - 1, 0, MAX_SEED)
        sampling = SamplingSettings.build(values)
        require_range("variation_seed", sampling.variation_seed + batch_size - 1, -1, MAX_SEED)
        solver = known_name("sample_solver", values["sample_solver"], samplers.names())
        steps = len(sampling.sigmas) or samplers.steps_of(solver, int(values["num_inference_steps"]))
        if steps != values["num_inference_steps"] and "num_inference_steps" in asked:
            notes.append(f"There are {steps} steps: {'sigmas' if sampling.sigmas else 'sample_solver'} says so.")
        loras, lora_notes = lora_choices(values["activated_loras"], values["loras_multipliers"])
        return cls(
            prompt=values["prompt"],
            negative_prompt=values["negative_prompt"],
            multi_prompts_gen_type=prompts.mode_of(values["multi_prompts_gen_type"]),
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=float(values["guidance_scale"]),
            seed=seed,
            batch_size=batch_size,
            flow_shift=flow_shift_of(preset, values, asked),
            sample_solver="" if solver == "default" else solver,
            sampling=sampling,
            **nag_of(preset, values, asked),
            denoising_strength=float(values["denoising_strength"]),
            control_net_weight=float(values["control_net_weight"]),
            loras=loras,
            error_lora_strength=float(values["error_lora_strength"]),
            VAE_tile_size=tile_size_of(values.get("VAE_tile_size")),
            cfg_normalization=float(values["cfg_normalization"]),
            cfg_truncation=float(values["cfg_truncation"]),
            edit=EditSettings.build({**values, "video_prompt_type": merged.get("video_prompt_type")}),
            extra={key: value for key, value in merged.items() if key in HOST_SETTING_KEYS and value is not None},
            notes=(*notes, *ineffective(preset, values, solver), *lora_notes),
        )

    def for_image(self, index: int) -> GenerationSettings:
        """The settings that draw image `index` of the batch alone: its own seed, a batch of one.

        The images of a variation share the seed; each has its own variation seed.
        """
        seed = self.seed if self.sampling.variation_strength else self.seed + index
        return replace(self, seed=seed, sampling=self.sampling.for_image(index), batch_size=1)

    def with_plain_prompts(self, prompt: str, negative_prompt: str) -> GenerationSettings:
        """The same with these texts, in which nothing is left to choose, as the one prompt."""
        written = prompts.escape(prompt)
        return replace(
            self,
            prompt=written,
            negative_prompt=prompts.escape(negative_prompt),
            multi_prompts_gen_type=prompts.WHOLE,
            prompt_template="" if written == self.prompt else self.prompt,
        )

    def as_record(self) -> dict[str, Any]:
        """The settings in Wan2GP's key names (contract C5). `build` with the same preset reads back the same
        settings: values are written even where they are the usual ones, because a preset may have others.
        """
        record: dict[str, Any] = {
            **self.extra,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "multi_prompts_gen_type": self.multi_prompts_gen_type,
            "resolution": f"{self.width}x{self.height}",
            "batch_size": self.batch_size,
            "seed": self.seed,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "sample_solver": self.sample_solver,
            "NAG_scale": self.NAG_scale,
            "NAG_tau": self.NAG_tau,
            "NAG_alpha": self.NAG_alpha,
            "denoising_strength": self.denoising_strength,
            "control_net_weight": self.control_net_weight,
            **loras_as_host_settings(self.loras),
            **({"prompt_template": self.prompt_template} if self.prompt_template else {}),
            **self.sampling.as_record(),
            **self.edit.as_record(),
        }
        if self.flow_shift is not None:
            record["flow_shift"] = self.flow_shift
        # Wan2GP does not know these.
        ours = {"VAE_tile_size": None, "cfg_normalization": 0.0, "cfg_truncation": 1.0, "error_lora_strength": 1.0}
        return record | {key: getattr(self, key) for key, rest in ours.items() if getattr(self, key) != rest}

    def host_kwargs(self) -> dict[str, Any]:
        """The settings as keywords of a pipeline object's `generate` (contract C1d)."""
        return {
            "input_prompt": prompts.plain(self.prompt),
            "n_prompt": prompts.plain(self.negative_prompt),
            "seed": self.seed,
            "sampling_steps": self.num_inference_steps,
            "sample_solver": self.sample_solver,
            "width": self.width,
            "height": self.height,
            "batch_size": self.batch_size,
            "guide_scale": self.guidance_scale,
            "shift": self.flow_shift,
            "NAG_scale": self.NAG_scale,
            "NAG_tau": self.NAG_tau,
            "NAG_alpha": self.NAG_alpha,
            "denoising_strength": self.denoising_strength,
            "context_scale": [self.control_net_weight],
            **self.sampling.host_kwargs(),
            "VAE_tile_size": self.VAE_tile_size,
            "cfg_normalization": self.cfg_normalization,
            "cfg_truncation": self.cfg_truncation,
            "image_mode": self.extra.get("image_mode", 1),
        }


def parse_lora(text: str) -> LoraChoice:
    """A LoRA as typed: FILE or FILE:STRENGTH ("style.safetensors:0.8"; in "C:\\style.sft" there is none)."""
    name, colon, multiplier = text.rpartition(":")
    if colon and name and is_strength(multiplier):
        return LoraChoice(name, multiplier)
    return LoraChoice(text)


def loras_as_host_settings(loras: Sequence[LoraChoice]) -> dict[str, Any]:
    """LoRA choices as the host's two settings."""
    return {
        "activated_loras": [lora.file for lora in loras],
        "loras_multipliers": " ".join(lora.multiplier for lora in loras),
    }

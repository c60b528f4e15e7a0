"""Generation settings: a preset's defaults, what was saved and what is asked for, checked, as one value."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shared import samplers
from shared.app import prompts
from shared.app.edit_settings import EditSettings
from shared.app.host_keys import HOST_SETTING_KEYS, RECORD_KEYS
from shared.app.loras import is_strength, parse_strength, split_strengths
from shared.app.presets import LoraChoice, Preset, pair_loras
from shared.app.sampling_settings import MAX_DRAWN_SEED, MAX_SEED, SamplingSettings, known_name
from shared.app.schema import SETTING_KEYS, closest_key, describe, require_setting, unknown_key
from shared.quant.errors import UserError

MAX_STEPS = 1000  # the schedule is defined on 1000 training steps
MAX_SIDE = 8192  # pixels; the network's rotary table has 512 positions of 16 pixels each way
DEFAULT_BLOCK = 16  # pixels; the VAE halves three times, the network's patches once
DEFAULT_BATCH_MAX = 16
MIN_TILE = 16  # latent cells of 8 pixels; smaller tiles are mostly overlap
_NAG_KEYS = ("NAG_scale", "NAG_tau", "NAG_alpha")

# key -> (lowest, highest) allowed value; None: no bound
_RANGES: Mapping[str, tuple[float, float | None]] = {
    "num_inference_steps": (1, MAX_STEPS),
    "guidance_scale": (0, None),
    "seed": (-1, MAX_SEED),
    "NAG_scale": (0, None),
    "NAG_tau": (0, None),
    "NAG_alpha": (0, 1),
    "denoising_strength": (0, 1),
    "error_lora_strength": (0, None),
    "control_net_weight": (0, None),
    "cfg_normalization": (0, None),
    "cfg_truncation": (0, 1),
}


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
        found, notes = _usable_saved(preset, saved or {})
        merged = {**preset.settings, **found, **asked}
        _require_config(preset, asked.get("config"))
        unused = HOST_SETTING_KEYS - {"config"}
        notes += [f'"{key}" is a setting of Wan2GP without effect here.' for key in asked if key in unused]
        values = {
            key: require_setting("settings", key, merged[key]) for key in SETTING_KEYS if merged.get(key) is not None
        }
        _require_values(preset, values)
        width, height = parse_resolution(values["resolution"], _block(preset))
        batch_size = int(values["batch_size"])
        seed = int(values["seed"])
        if seed < 0:
            seed = random.SystemRandom().randint(0, MAX_DRAWN_SEED)
        _require_range("seed", seed + batch_size - 1, 0, MAX_SEED)
        sampling = SamplingSettings.build(values)
        _require_range("variation_seed", sampling.variation_seed + batch_size - 1, -1, MAX_SEED)
        solver = known_name("sample_solver", values["sample_solver"], samplers.names())
        steps = len(sampling.sigmas) or samplers.steps_of(solver, int(values["num_inference_steps"]))
        if steps != values["num_inference_steps"] and "num_inference_steps" in asked:
            notes.append(f"There are {steps} steps: {'sigmas' if sampling.sigmas else 'sample_solver'} says so.")
        loras, lora_notes = _lora_choices(values["activated_loras"], values["loras_multipliers"])
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
            flow_shift=_flow_shift(preset, values, asked),
            sample_solver="" if solver == "default" else solver,
            sampling=sampling,
            **_nag(preset, values, asked),
            denoising_strength=float(values["denoising_strength"]),
            control_net_weight=float(values["control_net_weight"]),
            loras=loras,
            error_lora_strength=float(values["error_lora_strength"]),
            VAE_tile_size=_tile_size(values.get("VAE_tile_size")),
            cfg_normalization=float(values["cfg_normalization"]),
            cfg_truncation=float(values["cfg_truncation"]),
            edit=EditSettings.build({**values, "video_prompt_type": merged.get("video_prompt_type")}),
            extra={key: value for key, value in merged.items() if key in HOST_SETTING_KEYS and value is not None},
            notes=(*notes, *_ineffective(preset, values, solver), *lora_notes),
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


def parse_resolution(text: str, block: int = DEFAULT_BLOCK) -> tuple[int, int]:
    """(width, height) in pixels from "WIDTHxHEIGHT". Raises UserError naming the nearest two sizes."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX*×]\s*(\d{1,6})\s*", text)
    if match is None:
        raise UserError(f'"resolution" must be WIDTHxHEIGHT in pixels, got {describe(text)}.', "Example: 1024x768.")
    width, height = int(match[1]), int(match[2])
    for side, pixels in (("width", width), ("height", height)):
        if not block <= pixels <= MAX_SIDE:
            raise UserError(f'"resolution" {width}x{height}: the {side} must be from {block} to {MAX_SIDE} pixels.')
        if pixels % block:
            below = pixels // block * block
            raise UserError(
                f'"resolution" {width}x{height}: the {side} {pixels} is not a multiple of {block}.',
                f"The nearest two are {below} and {below + block}.",
            )
    return width, height


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


def _require_values(preset: Preset, values: Mapping[str, Any]) -> None:
    """Raise UserError for the first value that is out of its range."""
    for key in ("prompt", "negative_prompt"):
        _require_text(key, values[key])
    for key, (lowest, highest) in _RANGES.items():
        _require_range(key, values[key], lowest, highest)
    most = int(preset.model_def.get("image_batch_size_max", DEFAULT_BATCH_MAX))
    _require_range("batch_size", int(values["batch_size"]), 1, most)


def _block(preset: Preset) -> int:
    """Pixels that sides are multiples of."""
    return int(preset.model_def.get("vae_block_size", DEFAULT_BLOCK))


def _ineffective(preset: Preset, values: Mapping[str, Any], solver: str) -> list[str]:
    """What is asked for and does not suit the model or the rest, in words."""
    notes = []
    if samplers.is_unified(solver) and not preset.model_def.get("unified_solver"):
        notes.append(f'"sample_solver" {solver} is made for TwinFlow\'s weights, which {preset.id} does not have.')
    if preset.model_def.get("NAG") and values["NAG_scale"] > 1 and values["guidance_scale"] > 1:
        notes.append('"NAG_scale" has no effect together with a guidance_scale above 1.')
    return notes


def _usable_saved(preset: Preset, saved: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What of saved settings can be used with this preset, and notes on what cannot."""
    usable, notes = {}, []
    for key, value in saved.items():
        if value is None or key in RECORD_KEYS or key == "model" or key.startswith("_"):
            continue
        if key in SETTING_KEYS or key in HOST_SETTING_KEYS:
            usable[key] = value
        else:
            closest = closest_key(key, frozenset(SETTING_KEYS) | HOST_SETTING_KEYS)
            notes.append(
                f'saved settings: unknown key "{key}"' + (f', the closest is "{closest}".' if closest else ".")
            )
    if not preset.model_def.get("NAG") and _exceeds_one(usable.get("NAG_scale")):
        notes.append(f'saved settings: "NAG_scale" has no effect, {preset.id} does not offer NAG.')
    return usable, notes


def _exceeds_one(value: Any) -> bool:
    return isinstance(value, int | float) and value > 1


def _require_range(key: str, value: float, lowest: float, highest: float | None) -> None:
    if value < lowest or (highest is not None and value > highest):
        allowed = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise UserError(f'"{key}" must be {allowed}, got {value}.')


def _require_text(key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f'"{key}" has a character that is none, after {describe(text[: error.start][-20:])}.',
            "A terminal that is not set to UTF-8 sends such: set its locale, or give the prompt in a settings file.",
        ) from error


def _require_config(preset: Preset, name: Any) -> None:
    if name and preset.configured(str(name)) is preset:
        known = ", ".join(preset.configs) or "none"
        raise UserError(f'"config" {describe(name)} is not among those of {preset.id}.', f"Known: {known}.")


def _flow_shift(preset: Preset, values: Mapping[str, Any], asked: Mapping[str, Any]) -> float | None:
    """The shift; None where the preset does not let the user set it (Wan2GP saves a number all the same)."""
    if not preset.model_def.get("flow_shift"):
        if "flow_shift" in asked:
            raise UserError(
                f'"flow_shift" cannot be set for {preset.id}: its schedule is fixed.',
                "Leave it out, or use a base preset.",
            )
        return None
    if values.get("flow_shift") is None:
        return None
    if values["flow_shift"] <= 0:
        raise UserError(f'"flow_shift" must be above 0, got {values["flow_shift"]}.')
    return float(values["flow_shift"])


def _nag(preset: Preset, values: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    if preset.model_def.get("NAG"):
        return {key: float(values[key]) for key in _NAG_KEYS}
    if "NAG_scale" in asked and values["NAG_scale"] > 1:
        raise UserError(
            f'"NAG_scale" cannot be set for {preset.id}: it does not offer NAG.',
            "Use guidance_scale instead.",
        )
    return {key: float(SETTING_KEYS[key].default) for key in _NAG_KEYS}


def _tile_size(value: Any) -> int | None:
    if value is None:
        return None
    if 0 < value < MIN_TILE or value < 0:
        raise UserError(f'"VAE_tile_size" must be 0 or at least {MIN_TILE} latent cells, got {value}.')
    return int(value)


def _lora_choices(files: Sequence[str], multipliers: Any) -> tuple[tuple[LoraChoice, ...], list[str]]:
    """LoRAs with their strengths, and notes on strengths too many or too few."""
    strengths = split_strengths(multipliers)
    for strength in strengths[: len(files)]:
        parse_strength(strength)
    surplus = len(strengths) - len(files)
    notes = []
    if surplus > 0:
        notes.append(f'"loras_multipliers" has {surplus} more than there are LoRAs; they are not used.')
    elif strengths and surplus < 0:
        notes.append(f'"loras_multipliers" has {-surplus} fewer than there are LoRAs; the last ones get 1.')
    return pair_loras(files, strengths), notes

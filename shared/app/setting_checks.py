"""What settings may be: ranges, forms, what a preset does not offer, and notes on what has no effect."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shared import samplers
from shared.app.host_keys import HOST_SETTING_KEYS, RECORD_KEYS
from shared.app.loras import parse_strength, split_strengths
from shared.app.presets import LoraChoice, Preset, pair_loras
from shared.app.sampling_settings import MAX_SEED
from shared.app.schema import SETTING_KEYS, closest_key, describe
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


def usable_saved(preset: Preset, saved: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
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


def require_values(preset: Preset, values: Mapping[str, Any]) -> None:
    """Raise UserError for the first value that is out of its range."""
    for key in ("prompt", "negative_prompt"):
        _require_text(key, values[key])
    for key, (lowest, highest) in _RANGES.items():
        require_range(key, values[key], lowest, highest)
    require_range("batch_size", int(values["batch_size"]), 1, batch_max_of(preset.model_def))


def block_of(model_def: Mapping[str, Any]) -> int:
    """Pixels that sides are multiples of."""
    return int(model_def.get("vae_block_size") or DEFAULT_BLOCK)


def batch_max_of(model_def: Mapping[str, Any]) -> int:
    """Most pictures of one call."""
    return int(model_def.get("image_batch_size_max") or DEFAULT_BATCH_MAX)


def ineffective(preset: Preset, values: Mapping[str, Any], solver: str) -> list[str]:
    """What is asked for and does not suit the model or the rest, in words."""
    notes = []
    if samplers.is_unified(solver) and not preset.model_def.get("unified_solver"):
        notes.append(f'"sample_solver" {solver} is made for TwinFlow\'s weights, which {preset.id} does not have.')
    if preset.model_def.get("NAG") and values["NAG_scale"] > 1 and values["guidance_scale"] > 1:
        notes.append('"NAG_scale" has no effect together with a guidance_scale above 1.')
    return notes


def _exceeds_one(value: Any) -> bool:
    return isinstance(value, int | float) and value > 1


def require_range(key: str, value: float, lowest: float, highest: float | None) -> None:
    """Raise UserError for a value outside its range; without a highest one it has no end."""
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


def require_config(preset: Preset, name: Any) -> None:
    """Raise UserError for a configuration that the preset does not have."""
    if name and preset.configured(str(name)) is preset:
        known = ", ".join(preset.configs) or "none"
        raise UserError(f'"config" {describe(name)} is not among those of {preset.id}.', f"Known: {known}.")


def flow_shift_of(preset: Preset, values: Mapping[str, Any], asked: Mapping[str, Any]) -> float | None:
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


def nag_of(preset: Preset, values: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The three settings of NAG; the usual ones for a preset that does not offer it."""
    if preset.model_def.get("NAG"):
        return {key: float(values[key]) for key in _NAG_KEYS}
    if "NAG_scale" in asked and values["NAG_scale"] > 1:
        raise UserError(
            f'"NAG_scale" cannot be set for {preset.id}: it does not offer NAG.',
            "Use guidance_scale instead.",
        )
    return {key: float(SETTING_KEYS[key].default) for key in _NAG_KEYS}


def tile_size_of(value: Any) -> int | None:
    """Latent cells of a tile, 0 for one piece; None leaves it to the plan."""
    if value is None:
        return None
    if 0 < value < MIN_TILE or value < 0:
        raise UserError(f'"VAE_tile_size" must be 0 or at least {MIN_TILE} latent cells, got {value}.')
    return int(value)


def lora_choices(files: Sequence[str], multipliers: Any) -> tuple[tuple[LoraChoice, ...], list[str]]:
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

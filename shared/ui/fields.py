"""What the page offers for a preset: which fields, their choices, their values. Knows no gradio."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.app.presets import Preset
from shared.app.setting_checks import batch_max_of, block_of

CUSTOM = "custom"  # the resolution choice that opens the width and height fields
RANDOM_SEED = -1
LORA_SUFFIXES = (".safetensors", ".sft")

# Aspect ratios offered when the model definition names no resolutions, at the area of the preset's own default.
_RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
_DEFAULT_SIZE = (1024, 1024)

Choices = tuple[tuple[str, str], ...]  # (label, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """The generate form of one preset: a `has_*` says whether the model knows the field, the rest are its values."""

    resolutions: Choices
    resolution: str  # "WIDTHxHEIGHT" as in `resolutions`, or CUSTOM
    width: int
    height: int
    num_inference_steps: int
    steps_locked: bool
    has_guidance: bool
    guidance_scale: float
    negative_prompt: str
    has_flow_shift: bool
    flow_shift: float
    has_nag: bool
    NAG_scale: float
    NAG_tau: float
    NAG_alpha: float
    solvers: Choices  # empty when the model has only one
    sample_solver: str
    seed: int
    batch_size: int
    batch_max: int
    loras: tuple[str, ...]  # files in the family's LoRA folder
    activated_loras: tuple[str, ...]
    loras_multipliers: str
    has_error_lora: bool  # one that corrects the model's packing lies beside its file
    error_lora_strength: float

    def uses_negative_prompt(self, guidance_scale: float, nag_scale: float) -> bool:
        """Whether a negative prompt changes the picture: through guidance above 0, or through NAG above 1."""
        return (self.has_guidance and guidance_scale > 0) or (self.has_nag and nag_scale > 1)


def fields_for(
    preset: Preset, values: Mapping[str, Any], loras: Sequence[str] = (), *, has_error_lora: bool = False
) -> Fields:
    """The form of `preset` filled with `values` (host key names) over the preset's own settings.

    loras: the files that may be chosen; chosen files that are not among them are left out.
    """
    model_def = preset.model_def
    settings = {**preset.settings, **values}
    width, height = parse_size(str(settings.get("resolution", ""))) or _DEFAULT_SIZE
    resolutions = _resolutions(preset)
    resolution = f"{width}x{height}"
    solvers = _pairs(model_def.get("sample_solvers") or ())
    chosen = tuple(name for name in settings.get("activated_loras") or () if name in loras)
    return Fields(
        resolutions=(*resolutions, ("Custom size", CUSTOM)),
        resolution=resolution if resolution in {value for _, value in resolutions} else CUSTOM,
        width=width,
        height=height,
        num_inference_steps=int(settings.get("num_inference_steps") or 8),
        steps_locked=bool(model_def.get("lock_inference_steps")),
        has_guidance=bool(model_def.get("guidance_max_phases") or model_def.get("guidance_optional")),
        guidance_scale=float(settings.get("guidance_scale") or 0.0),
        negative_prompt=str(settings.get("negative_prompt") or ""),
        has_flow_shift=bool(model_def.get("flow_shift")),
        flow_shift=float(settings.get("flow_shift") or 3.0),
        has_nag=bool(model_def.get("NAG")),
        NAG_scale=float(settings.get("NAG_scale") or 1.0),
        NAG_tau=_number(settings, "NAG_tau", 3.5),
        NAG_alpha=_number(settings, "NAG_alpha", 0.5),
        solvers=solvers if len(solvers) > 1 else (),
        sample_solver=str(settings.get("sample_solver") or (solvers[0][1] if solvers else "")),
        seed=int(settings.get("seed", RANDOM_SEED)),
        batch_size=max(1, int(settings.get("batch_size") or 1)),
        batch_max=max(1, batch_max_of(model_def)),
        loras=tuple(loras),
        activated_loras=chosen,
        loras_multipliers=str(settings.get("loras_multipliers") or "") if chosen else "",
        has_error_lora=has_error_lora,
        error_lora_strength=float(settings.get("error_lora_strength", 1.0)),
    )


def overrides(fields: Fields, entered: Mapping[str, Any]) -> dict[str, Any]:
    """What the user entered, under the host's key names, without the fields this model does not know.

    entered: values of the page's components by name; a number field left empty arrives as None and is left out.
    """
    size = entered["resolution"]
    if size == CUSTOM:
        size = f"{entered['width'] or 0}x{entered['height'] or 0}"
    known = {
        "prompt": True,
        "negative_prompt": fields.uses_negative_prompt(entered["guidance_scale"] or 0.0, entered["NAG_scale"] or 1.0),
        "num_inference_steps": True,
        "guidance_scale": fields.has_guidance,
        "seed": True,
        "batch_size": True,
        "flow_shift": fields.has_flow_shift,
        "sample_solver": bool(fields.solvers),
        **dict.fromkeys(("NAG_scale", "NAG_tau", "NAG_alpha"), fields.has_nag),
        "activated_loras": True,
        "loras_multipliers": bool(entered["activated_loras"]),
        "error_lora_strength": True,
    }
    taken = {key: entered[key] for key, is_known in known.items() if is_known and entered[key] is not None}
    return {"resolution": size, **taken}


def preset_choices(grouped: Sequence[tuple[str, Sequence[Preset]]]) -> list[tuple[str, str]]:
    """(label, preset id) in the order of the groups; a name that does not begin with its family gets it in front."""
    return [
        (preset.name if preset.name.startswith(family) else f"{family} · {preset.name}", preset.id)
        for family, presets in grouped
        for preset in presets
    ]


def parse_size(text: str) -> tuple[int, int] | None:
    """(width, height) in pixels from "WIDTHxHEIGHT", or None."""
    match = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", text)
    return (int(match[1]), int(match[2])) if match else None


def find_loras(folder: Path) -> tuple[str, ...]:
    """LoRA files under `folder`, as names relative to it with forward slashes; empty when there is no such folder."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in LORA_SUFFIXES)
    return tuple(sorted((path.relative_to(folder).as_posix() for path in files), key=str.lower))


def _resolutions(preset: Preset) -> Choices:
    """(label, "WxH") choices: the model definition's own list, else common ratios at the default's area."""
    own = preset.model_def.get("resolutions")
    default = parse_size(str(preset.settings.get("resolution", ""))) or _DEFAULT_SIZE
    if own:
        choices = {value: label for label, value in _pairs(own)}
    else:
        block = block_of(preset.model_def)
        sizes = [_fit(ratio, area=default[0] * default[1], block=block) for ratio in _RATIOS]
        choices = {f"{width}x{height}": size_label(width, height) for width, height in sizes}
    choices.setdefault(f"{default[0]}x{default[1]}", size_label(*default))
    return tuple((label, value) for value, label in choices.items())


def _fit(ratio: tuple[int, int], *, area: int, block: int) -> tuple[int, int]:
    """The size with about `area` pixels and about `ratio` whose sides are multiples of `block` pixels."""
    width = math.sqrt(area * ratio[0] / ratio[1])
    return max(block, round(width / block) * block), max(block, round(area / width / block) * block)


def size_label(width: int, height: int) -> str:
    """The size in pixels and the nearest common ratio: "1184 × 880 · landscape 4:3"."""
    nearest = min(_RATIOS, key=lambda ratio: abs(math.log(width * ratio[1] / (height * ratio[0]))))
    shape = "square" if width == height else "landscape" if width > height else "portrait"
    return f"{width} × {height} · {shape}" + ("" if width == height else f" {nearest[0]}:{nearest[1]}")


def _number(settings: Mapping[str, Any], key: str, usual: float) -> float:
    """The number that is set, of which 0 is one; the usual one for None and nothing."""
    value = settings.get(key)
    return usual if value is None else float(value)


def _pairs(entries: Sequence[Any]) -> Choices:
    """The host lists choices as (label, value) pairs or as bare values; sizes get a readable label."""
    pairs = []
    for entry in entries:
        label, value = (entry, entry) if isinstance(entry, str) else entry
        size = parse_size(value)
        pairs.append((size_label(*size) if size and label == value else str(label), str(value)))
    return tuple(pairs)

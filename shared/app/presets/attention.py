"""The attention that a preset asks for on a card, by conditions on its compute capability."""

from __future__ import annotations

import operator
import re

from shared.app.presets.preset import Preset

_COMPARE = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "": operator.eq,
}


def attention_rule(preset: Preset, capability: int | None) -> str | None:
    """The attention mode a preset asks for on a GPU of this compute capability (major * 10 + minor), or None.

    Conditions: <, <=, >, >=, = (or nothing) and a number; "&" is and, "+" is or; the first that holds counts.
    """
    if capability is None:
        return None
    rules = preset.model_def.get("attention") or {}
    return next((mode for condition, mode in rules.items() if _holds(condition, capability)), None)


def _holds(condition: str, capability: int) -> bool:
    def compare(comparison: str) -> bool:
        sign, bound = re.findall(r"([<>]?=?)\s*(\d+)", comparison)[0]  # its form was checked when it was read
        return bool(_COMPARE[sign](capability, int(bound)))

    return any(all(map(compare, part.split("&"))) for part in condition.split("+"))

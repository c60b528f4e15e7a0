"""LoRA strengths as people write them, in Wan2GP's notation, and what a family says of LoRA files, in words.

    0.8              one number for the whole run
    1,0.5,0          spread evenly over the steps: 8 steps take 1 1 1 0.5 0.5 0.5 0 0
    1;0              phases, at most three: the run's first half at 1, its second at 0
    0.9,0.8;1,0.5    a list in each phase

Strengths of several LoRAs are separated by spaces or lines; lines that begin with "#" are left out. One "|" between two
of them separates those of an accelerator from the user's in Wan2GP; here it is a space. What is missing is 1.
Wan2GP's phases are those of the guidance, of which its Z-Image has one, so that it refuses ";" there. Here they are
equal parts of the run. Source: Wan2GP docs/LORAS.md and shared/utils/loras_mutipliers.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.quant.errors import UserError

MAX_PHASES = 3
_UNMATCHED_SHOWN = 3

# One number, or phases of numbers.
Strength = float | tuple[tuple[float, ...], ...]

_EXAMPLES = 'Examples: "0.8" for all steps, "1,0.5" spread over the steps, "1;0" for the first and the second half.'


def parse_strength(text: str) -> Strength:
    """The strength that a text says. Raises UserError quoting what is wrong with it."""
    phases = tuple(tuple(_number(part, text) for part in phase.split(",")) for phase in text.strip().split(";"))
    if len(phases) > MAX_PHASES:
        raise UserError(f'The LoRA strength "{text}" has {len(phases)} phases; there are at most {MAX_PHASES}.')
    return phases[0][0] if len(phases) == 1 and len(phases[0]) == 1 else phases


def is_strength(text: str) -> bool:
    """Whether a text can be read as a strength."""
    try:
        parse_strength(text)
    except UserError:
        return False
    return True


def split_strengths(value: str | Sequence[Any]) -> list[str]:
    """The strengths of several LoRAs, from one text or a list. Raises UserError for more than one "|"."""
    if not isinstance(value, str):
        return [str(strength).strip() for strength in value]
    text = " ".join(line for line in value.splitlines() if not line.lstrip().startswith("#"))
    if text.count("|") > 1:
        raise UserError(f'The LoRA strengths "{text}" have {text.count("|")} "|"; one may separate two groups.')
    return text.replace("|", " ").split()


def match_words(match: Mapping[str, Any]) -> str:
    """How much of a LoRA file found a place in the model: "style.safetensors: 420 of 424 keys matched; not a, b, c …".

    match: "file", "matched", "total", "unmatched" (names).
    """
    words = f"{Path(match['file']).name}: {match['matched']} of {match['total']} keys matched"
    unmatched = match["unmatched"]
    if not unmatched:
        return words
    more = len(unmatched) - _UNMATCHED_SHOWN
    return f"{words}; not {', '.join(unmatched[:_UNMATCHED_SHOWN])}{f' and {more} more' if more > 0 else ''}"


def _number(part: str, text: str) -> float:
    if ":" in part:
        raise UserError(
            f'The LoRA strength "{text}" has ":", which separates the branches of models that have several.',
            f"Z-Image has one. {_EXAMPLES}",
        )
    try:
        number = float(part)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f'The LoRA strength "{text}" is no number{f" at {part!r}" if part != text else ""}.', _EXAMPLES)
    return number

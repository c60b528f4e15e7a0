"""Kinds of values: what each may be, in words and as a test, and how it is read from text."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_LARGEST = int(sys.float_info.max)  # JSON's whole numbers may be longer than that


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value may be: in words, as a test, and (if it can be typed as text) how to read it."""

    words: str
    accepts: Callable[[Any], bool]
    from_text: Callable[[str], Any] | None = None


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value)


def _is_number_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_number(item) for item in value)


def _numbers_from_text(text: str) -> list[float]:
    return [float(part) for part in re.split(r"[,\s]+", text.strip(" []")) if part]


def _is_links(value: Any) -> bool:
    return _is_text_list(value) or (isinstance(value, str) and value != "")


def _is_module_list(value: Any) -> bool:
    def is_module(item: Any) -> bool:
        return _is_links(item) or (isinstance(item, dict) and _is_links(item.get("URLs")))

    if isinstance(value, dict):  # named modules, which another preset picks as "id#name"
        return all(_is_links(item) for item in value.values())
    return _is_links(value) or (isinstance(value, list) and all(is_module(item) for item in value))


def _is_multiplier_list(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) or _is_number(item) for item in value)
    )


def _is_weights(value: Any) -> bool:
    def is_size(item: Any) -> bool:
        return _is_number(item) and item > 0

    def is_list(items: Any) -> bool:
        return isinstance(items, list) and items != [] and all(map(is_size, items))

    def fits(place: str, item: Any) -> bool:
        if is_size(item) or is_list(item):
            return True
        return (
            place == "modules" and isinstance(item, list) and item != [] and all(is_size(i) or is_list(i) for i in item)
        )

    return (
        isinstance(value, dict)
        and value.keys() <= {"transformer", "modules", "text_encoder", "VAE"}
        and all(fits(place, item) for place, item in value.items())
    )


def _is_attention_rules(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(mode, str) and CONDITION.fullmatch(condition) for condition, mode in value.items()
    )


def _is_configs(value: Any) -> bool:
    if isinstance(value, dict):
        return all(name.startswith("_") or isinstance(config, dict) for name, config in value.items())
    return isinstance(value, str)


def _flag_from_text(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]


# "<89", ">=75&<90", "86+89": comparisons with the compute capability as major * 10 + minor; & binds before +.
_COMPARISON = r"\s*(?:<=|>=|<|>|=)?\s*\d+\s*"
CONDITION = re.compile(f"{_COMPARISON}(?:[&+]{_COMPARISON})*")
TEXT = Kind("text", _is_text, str)
WHOLE = Kind("a whole number", _is_whole, int)
NUMBER = Kind("a number", _is_number, float)
LIMIT = Kind("a number, or true for 1", lambda value: _is_number(value) or isinstance(value, bool), float)
FLAG = Kind("true or false", lambda value: value in (True, False), _flag_from_text)
NUMBERS = Kind("a list of numbers, or a text of them with commas between", _is_number_list, _numbers_from_text)
PROMPT_MODE = Kind("FG, G or PG", lambda value: _is_text(value) or _is_whole(value), str)
TEXT_LIST = Kind("a list of texts", _is_text_list)
LINKS = Kind("a list of URLs or paths, or the id of another preset", _is_links)

MODULES = Kind(
    "a list of modules (each a list of URLs, a preset's id or an object with URLs), or a preset's id",
    _is_module_list,
)
MULTIPLIERS = Kind("a list of numbers or texts, or one text", _is_multiplier_list, str)
ATTENTION = Kind('an object like {"<89": "sdpa"}: condition on the compute capability -> mode', _is_attention_rules)

GIGABYTES = Kind(
    "an object of sizes above 0 (or lists of them) by transformer, modules, text_encoder and VAE", _is_weights
)
CONFIGS = Kind("an object of named sets of model keys, or the id of another preset", _is_configs)

# Only modules of the program's own: a preset from elsewhere must not choose what is imported.
SCORER = Kind(
    'a module of the folder training, "training.NAME"',
    lambda value: _is_text(value) and re.fullmatch(r"training\.\w+", value) is not None,
)
DTYPE = Kind('"bf16" or "fp16"', lambda value: value in ("bf16", "fp16"))

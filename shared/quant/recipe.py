"""A recipe: which layer of a model is written in which format, as an ordered list of patterns in a JSON file.

    {
      "description": "4 bits, and 8 where it shows",
      "rules": [
        ["layers\\.(0|29)\\.attention\\.out", "mxfp8"],
        ["layers\\.[0-9]+\\..*", "nvfp4"]
      ]
    }

A pattern is a regular expression for a whole module name, as the family's official files have it: no prefix, no
".weight", q, k and v fused. The first pattern that fits decides; a layer that none fits keeps its numbers, "bf16".
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.quant.errors import UserError

KEPT = "bf16"
_KEYS = ("description", "rules")


@dataclass(frozen=True)
class Rule:
    """Layers whose whole name fits `pattern` are written in `format`."""

    pattern: re.Pattern[str]
    format: str


@dataclass(frozen=True)
class Recipe:
    """Rules in the order they are asked."""

    path: Path
    description: str
    rules: tuple[Rule, ...]

    @classmethod
    def load(cls, path: str | Path, formats: Collection[str]) -> Recipe:
        """Read a recipe strictly. formats: the names that rules may use.

        Raises UserError naming the file and the entry for anything that is not exactly as described above.
        """
        path = Path(path)
        found = _read(path)
        odd = [key for key in found if key not in _KEYS]
        if odd:
            raise UserError(f"{path}: unknown entry {odd[0]!r}.", f"A recipe has {' and '.join(_KEYS)}.")
        description, rules = found.get("description", ""), found.get("rules")
        if not isinstance(description, str):
            raise UserError(f"{path}: description is {description!r}, expected a text.")
        if not isinstance(rules, list) or not rules:
            raise UserError(f"{path}: rules is {rules!r}, expected a list of [pattern, format].")
        read: list[Rule] = []
        for number, entry in enumerate(rules):
            rule = _rule(f"{path}: rules[{number}]", entry, formats)
            earlier = next((i for i, r in enumerate(read) if r.pattern.pattern == rule.pattern.pattern), None)
            if earlier is not None:
                raise UserError(
                    f"{path}: rules[{number}] repeats the pattern of rules[{earlier}], which decides.", "Remove one."
                )
            read.append(rule)
        return cls(path, description, tuple(read))

    def format_of(self, module: str) -> str:
        """The format for a module's weight: that of the first rule that fits, else KEPT."""
        return next((rule.format for rule in self.rules if rule.pattern.fullmatch(module)), KEPT)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: no readable JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, expected an object with rules.")
    return found


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: {twice!r} is given twice.")
    return result


def _rule(where: str, entry: Any, formats: Collection[str]) -> Rule:
    match entry:
        case [str(pattern), str(name)]:
            pass
        case _:
            raise UserError(f"{where} is {entry!r}, expected [pattern, format].")
    if name not in formats:
        close = difflib.get_close_matches(name, formats, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known are {', '.join(sorted(formats))}."
        raise UserError(f"{where}: unknown format {name!r}.", hint)
    try:
        return Rule(re.compile(pattern), name)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is no regular expression ({error}).") from error

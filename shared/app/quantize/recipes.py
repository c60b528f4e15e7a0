"""The recipe of a conversion: found by its name or file, opened where it leaves formats to be chosen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shared.app.quantize.request import QuantizeRequest
from shared.quant.errors import UserError
from shared.quant.recipe import KEPT, Recipe, Rule
from shared.quant.sensitivity import AUTO, GGUF_FORMATS, SAFETENSORS_FORMATS


def recipe_names(root: Path) -> list[str]:
    """Recipes that come with the program and ask for no size, by the name that --format and --recipe take."""
    return sorted({path.stem for path in (root / "models").glob("*/recipes/*.json")} - {AUTO})


def read_recipe(request: QuantizeRequest, folder: Path, formats: Sequence[str]) -> Recipe:
    """The recipe asked for, of the family's `folder` or a file of its own, its --keep patterns first.

    Raises UserError when there is none of that name, or a pattern is no regular expression.
    """
    path = folder / f"{request.recipe}.json"
    if not path.is_file():
        path = Path(request.recipe)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise UserError(f"{request.recipe}: there is no such format, recipe or file.", f"Known are {names}.")
    recipe = Recipe.load(path, formats)
    kept: list[Rule] = []
    for pattern in request.keep:
        try:
            kept.append(Rule(re.compile(pattern), KEPT))
        except re.error as error:
            raise UserError(f"--keep {pattern}: no regular expression ({error}).") from error
    return replace(recipe, rules=(*kept, *recipe.rules))


def opened_recipe(recipe: Recipe, is_gguf: bool) -> Recipe:
    """The recipe with the smallest format wherever it says "auto": for its names and for what it will not accept."""
    smallest = (GGUF_FORMATS if is_gguf else SAFETENSORS_FORMATS)[0]
    rules = tuple(replace(rule, format=smallest) if rule.format == AUTO else rule for rule in recipe.rules)
    return replace(recipe, rules=rules)


def rules_of(recipe: Recipe) -> list[list[str]]:
    """Pattern and format of each rule, as a recipe's file has them."""
    return [[rule.pattern.pattern, rule.format] for rule in recipe.rules]


def recipe_path(output: Path) -> Path:
    """Where the recipe is written that a file of chosen formats was made by."""
    return output.with_name(f"{output.name}.recipe.json")

"""Which format and which name every module of a new file gets, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from shared.quant.convert.jobs import Conversion, Job, Model, Place
from shared.quant.errors import UserError
from shared.quant.recipe import KEPT, Recipe
from shared.quant.targets import PLAIN, Naming, Target


def plan_conversion(
    model: Model, recipe: Recipe, known: Mapping[str, Target], *, gguf: bool = False, diffusers: bool = False
) -> Conversion:
    """Decide every module's format and name, from headers alone. gguf: whether the new file is one.

    diffusers: whether it has to have diffusers' names, which plain numbers can have.
    Raises UserError naming the layer when formats cannot stand in one file, or its size does not suit its format.
    """
    matrices = {module for module, shapes in model.shapes.items() if len(shapes.get("weight", ())) == 2}
    naming = _naming(model, recipe, known, matrices, gguf)
    if diffusers and naming == "official":
        naming = "diffusers"
    jobs: list[Job] = []
    for module, shapes in model.shapes.items():
        places = model.places(module, naming, packed=True)
        if all(_format_for(place, recipe) in PLAIN for place in places):
            places = model.places(module, naming, packed=False)
        for place in places:
            chosen = _format_for(place, recipe)
            if module not in matrices and chosen not in PLAIN:
                chosen = KEPT
            of_place = {s: (shape[0] * len(place.blocks) // place.of, *shape[1:]) for s, shape in shapes.items()}
            merges = [merge for merge in model.merges if module in merge.modules]
            jobs.append(Job(module, place, model.plan[module], of_place, chosen, known.get(chosen), merges))
    for job in jobs:
        _check_size(job)
    if diffusers and (packed := sorted({job.format for job in jobs if job.target})):
        raise UserError(
            f"{recipe.path}: diffusers reads no {' and no '.join(packed)} from a folder.", "Take bf16, fp16 or fp32."
        )
    return Conversion(model.checkpoint.path, tuple(jobs), naming)


def _naming(model: Model, recipe: Recipe, known: Mapping[str, Target], matrices: Collection[str], gguf: bool) -> Naming:
    """Which names the new file uses: those that all formats in it call for."""
    asked = {_format_for(p, recipe) for module in matrices for p in model.places(module, "official", packed=True)}
    asked -= set(PLAIN)
    # One file holds SVDQ of one kind: nunchaku takes the kind from the GPU.
    groups = {(known[name].naming, name if known[name].has_rank else "") for name in asked}
    if len(groups) > 1 or any(bool(known[name].gguf) != gguf for name in asked):
        container = "a GGUF file" if gguf else "a safetensors file"
        raise UserError(
            f"{recipe.path}: {' and '.join(sorted(asked))} cannot be written into {container} like this.",
            "GGUF types go into a file named .gguf, all others into .safetensors; int8 and SVDQ stand alone.",
        )
    return next((known[name].naming for name in asked), "official")


def _format_for(place: Place, recipe: Recipe) -> str:
    said = {name: recipe.format_of(name) for name in place.official}
    if len(set(said.values())) > 1:
        words = ", ".join(f"{name} in {chosen}" for name, chosen in said.items())
        raise UserError(
            f"{recipe.path}: {place.module} is one matrix in this kind of file, but it asks for {words}.",
            "Give both one format.",
        )
    return said[place.official[0]]


def _check_size(job: Job) -> None:
    if job.target is None:
        return
    rows, columns = job.shapes["weight"]
    if rows % job.target.rows or columns % job.target.columns:
        needs = f"rows in multiples of {job.target.rows} and columns of {job.target.columns}"
        names = " ".join(f"--keep '{re.escape(name)}'" for name in job.place.official)
        raise UserError(
            f"{job.place.module} is {rows} x {columns}, but {job.format} needs {needs}.", f"Keep it plain: {names}."
        )

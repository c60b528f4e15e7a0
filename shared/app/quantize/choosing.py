"""Which format each layer gets where a recipe says "auto", so that the file keeps to a size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shared.app.quantize.recipes import opened_recipe
from shared.app.quantize.request import QuantizeRequest
from shared.app.quantize.result import Chosen
from shared.quant.errors import UserError
from shared.quant.recipe import KEPT, Recipe, Rule
from shared.quant.sensitivity import AUTO, GGUF_FORMATS, SAFETENSORS_FORMATS, SVDQ_FORMATS

if TYPE_CHECKING:
    from shared.quant.convert import Conversion, Means, Model, OnProgress
    from shared.quant.sensitivity import Candidate, Sensitivity
    from shared.quant.targets import Target


@dataclass(frozen=True)
class Choosing:
    """Finds a format for each layer that a recipe leaves open."""

    request: QuantizeRequest
    recipe: Recipe
    family: Any
    model: Model
    known: Mapping[str, Target]
    means: Means
    on_progress: OnProgress

    def best(self) -> tuple[Recipe, list[Chosen], Conversion]:
        """The recipe whose layers have the least errors, why each is so, and the conversion by it.

        Raises UserError naming the smallest size that is possible, where it is more than the one asked for.
        """
        is_gguf = self.request.is_gguf
        formats = GGUF_FORMATS if is_gguf else SAFETENSORS_FORMATS
        choices = [self._among(formats, opened_recipe(self.recipe, is_gguf))]
        if not is_gguf and (not choices[0].fits or any(c.format == formats[0] for c in choices[0].found.values())):
            choices += [choice for kind in SVDQ_FORMATS if (choice := self._in_svdq(kind)) is not None]
        fitting = [choice for choice in choices if choice.fits]
        if not fitting:
            smallest = min(choice.smallest for choice in choices)
            raise UserError(
                f"--target-size: {self._size} is too small; the smallest file of this recipe takes "
                f"{smallest / 1e6:,.1f} MB.",
                "Allow that much, or write a recipe that packs more layers.",
            )
        chosen = min(fitting, key=lambda choice: choice.error)
        rules = [Rule(re.compile(re.escape(name)), format) for name, format in chosen.formats.items()]
        has_rank = any(format in SVDQ_FORMATS for format in chosen.formats.values())
        asked = f"{self._size}, --rank {self.means.rank}" if has_rank else self._size
        words = f"Chosen for {self.request.source.name} and {asked}. {self.recipe.description}"
        fixed = [rule for rule in self.recipe.rules if rule.format != AUTO]
        # First, since no other rule decided about these layers.
        recipe = replace(self.recipe, description=words, rules=(*rules, *fixed))
        return recipe, chosen.reasons, self._plan(recipe)

    def _plan(self, recipe: Recipe) -> Conversion:
        from shared.quant.convert import plan_conversion

        return plan_conversion(self.model, recipe, self.known, gguf=self.request.is_gguf)

    def _in_svdq(self, kind: str) -> _Choice | None:
        """What can be had in a file of SVDQ layers of one kind, and plain ones; None where the recipe forbids that."""
        from shared.quant.targets import PLAIN

        usual = Recipe.load(self.family.RECIPES / f"{kind}.json", [*self.known, *PLAIN])
        opened = self._plan(opened_recipe(self.recipe, is_gguf=False))
        names = [name for job in opened.jobs for name in job.place.official if self._is_open(name)]
        packed = [name for name in names if usual.format_of(name) == kind]
        rules = [Rule(re.compile(re.escape(name)), kind if name in packed else KEPT) for name in names]
        fixed = [rule for rule in self.recipe.rules if rule.format != AUTO]
        try:
            return self._among((kind, KEPT), replace(self.recipe, rules=(*rules, *fixed)), only=packed)
        except UserError:
            return None  # other formats are fixed for other layers, or sizes do not divide

    @property
    def _size(self) -> str:
        return f"{self.request.target_size / 1e6:,.1f} MB"

    def _is_open(self, name: str) -> bool:
        return self.recipe.format_of(name) == AUTO

    def _among(self, names: Sequence[str], opened: Recipe, only: Sequence[str] | None = None) -> _Choice:
        """Choose among these formats. opened: the recipe with the smallest where it says "auto".

        only: of the open layers those that may be packed; None is all.
        """
        from shared.quant.convert import expected_bytes
        from shared.quant.sensitivity import choose, probe

        conversion = self._plan(opened)
        formats = {name: self.known.get(name) for name in names}
        layers = []
        for job in conversion.jobs:
            first = job.place.official[0]
            if job.target and self._is_open(first) and (only is None or first in only):
                self.on_progress(0, conversion.numbers, f"Trying {', '.join(names)} on {job.place.module}")
                layers.append(probe(job, formats, self.means))
        rank = self.means.rank if conversion.has_rank else None
        header = self.family.header(conversion.naming, {}, self.model.config, rank)
        # All that is not chosen for: the file with the smallest formats, without them.
        smallest = sum(min(c.bytes for c in layer.candidates) for layer in layers)
        rest = expected_bytes(conversion, header, self.means.rank) - smallest
        fits = rest + smallest <= self.request.target_size
        return _Choice(layers, choose(layers, self.request.target_size - rest) if fits else {}, rest + smallest, fits)


@dataclass(frozen=True)
class _Choice:
    """What was found for each layer among some formats; nothing where the size does not allow it."""

    layers: Sequence[Sensitivity]
    found: Mapping[str, Candidate]
    smallest: int  # bytes of the smallest file
    fits: bool

    @property
    def error(self) -> float:
        """Sum of squared errors; a matrix that stacks several counts as often."""
        return sum(len(layer.names) * self.found[layer.name].error ** 2 for layer in self.layers)

    @property
    def formats(self) -> dict[str, str]:
        """Format by the name that recipes have."""
        return {name: self.found[layer.name].format for layer in self.layers for name in layer.names}

    @property
    def reasons(self) -> list[Chosen]:
        return [
            Chosen(
                layer=layer.name,
                format=self.found[layer.name].format,
                kurtosis=layer.kurtosis,
                peak=layer.peak,
                errors={candidate.format: candidate.error for candidate in layer.candidates},
            )
            for layer in self.layers
        ]

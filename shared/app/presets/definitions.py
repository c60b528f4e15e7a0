"""Definitions: each preset's "model" part as its layers make it, and references between presets followed."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shared.app.presets.layers import SIZED, Layer, laid_over
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.families import Families


class BrokenDefinition(UserError):
    """A preset cannot be built; `owner` is the id of the definition that holds the mistake."""

    def __init__(self, owner: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.owner = owner


class Definitions:
    """The layers of all presets by id, and what follows from them."""

    def __init__(self, families: Families) -> None:
        self.families = families
        self.layers: dict[str, list[Layer]] = {}

    def model(self, preset_id: str) -> dict[str, Any]:
        """The JSONs' "model" parts laid over each other."""
        return functools.reduce(laid_over, (layer.model for layer in self.layers[preset_id]), {})

    def definition(self, preset_id: str) -> dict[str, Any]:
        """The handler's definition with the JSON's "model" on top."""
        model = self.model(preset_id)
        architecture = model.get("architecture")
        if architecture is None:
            raise self.error(preset_id, 'the "model" part has no "architecture".', "Name one: z_image, for instance.")
        try:
            handler = self.families.handler(architecture)
        except UserError as error:
            raise self.error(preset_id, error.message, error.hint) from error
        return (handler.query_model_def(architecture, model) or {}) | model

    def error(self, preset_id: str, message: str, hint: str = "") -> BrokenDefinition:
        """A mistake of this preset, with the file that it is in."""
        return BrokenDefinition(preset_id, f"{self.layers[preset_id][-1].path}: {message}", hint)

    def inherited(self, preset_id: str, definition: Mapping[str, Any], key: str) -> Any:
        """The value of a model key; a text is the id of another preset, whose value is used, and so on."""
        value, chain = definition.get(key), [preset_id]
        while isinstance(value, str):
            owner = chain[-1]
            if value in chain:
                circle = " -> ".join([*chain[chain.index(value) :], value])
                raise self.error(owner, f'"{key}" refers to itself: {circle}.')
            self._require_preset(owner, key, value)
            chain.append(value)
            value = self.definition(value).get(key)
        return value or []

    def _require_preset(self, owner: str, key: str, reference: str) -> None:
        if reference in self.layers:
            return
        if "/" in reference or reference.endswith((".safetensors", ".sft")):
            raise self.error(owner, f'"{key}" must be a list: write ["{reference}"].')
        closest = difflib.get_close_matches(reference, self.layers, n=1)
        raise self.error(
            owner,
            f'"{key}" refers to the preset "{reference}", which does not exist.',
            f'The closest is "{closest[0]}".' if closest else "",
        )

    def modules(self, preset_id: str, definition: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
        """Alternatives of each module. Named modules are not the preset's own: it lends them ("id#name")."""
        modules = self.inherited(preset_id, definition, "modules")
        if isinstance(modules, Mapping):
            return ()
        return tuple(self._module(preset_id, item, ()) for item in modules)

    def _module(self, owner: str, item: Any, chain: tuple[str, ...]) -> tuple[str, ...]:
        """Alternatives of one module: a list, {"URLs": list}, or "id" / "id#name" of another preset's."""
        if isinstance(item, Mapping):
            item = item["URLs"]
        if not isinstance(item, str):
            return tuple(item)
        if item in chain:
            raise self.error(owner, f'"modules" refers to itself: {" -> ".join([*chain, item])}.')
        reference, _, name = item.partition("#")
        self._require_preset(owner, "modules", reference)
        modules = self.inherited(reference, self.definition(reference), "modules")
        if name and isinstance(modules, Mapping) and name in modules:
            return self._module(reference, modules[name], (*chain, item))
        if not name and isinstance(modules, Sequence) and len(modules) == 1:
            return self._module(reference, modules[0], (*chain, item))
        has = f"names {', '.join(modules)}" if isinstance(modules, Mapping) else f"a list of {len(modules)}"
        raise self.error(owner, f'"modules" asks for "{item}", but "{reference}" has {has}.')

    def stated_sizes(self, definition: Mapping[str, Any], place: str) -> list[list[float]]:
        """Gigabytes of the alternatives of each file of one place, in their order.

        By the preset's own word, else that of the preset whose files it takes.
        """
        key = SIZED[place][0]
        while True:
            stated = (definition.get("gigabytes") or {}).get(place)
            files = definition.get(key)
            if stated is not None or not isinstance(files, str):
                sizes = stated if isinstance(stated, list) else [] if stated is None else [stated]
                files_of_place = sizes if place == "modules" else [sizes]
                return [size if isinstance(size, list) else [size] for size in files_of_place]
            definition = self.definition(files)  # no circle: the files themselves were resolved before

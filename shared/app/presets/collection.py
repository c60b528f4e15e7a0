"""All presets: the files of every folder read and built, a user's wrong ones left out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.app.presets.building import build
from shared.app.presets.definitions import BrokenDefinition, Definitions
from shared.app.presets.layers import read_layer
from shared.app.presets.preset import Preset
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.families import Families


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetCollection:
    """All presets by id. problems: a line for each user file that was left out; broken: the same by id."""

    presets: dict[str, Preset]
    problems: list[str]
    broken: Mapping[str, UserError]
    families: Families

    def get(self, preset_id: str) -> Preset:
        """The preset with this id. Raises UserError with the closest ids, or with why it was left out."""
        if preset_id in self.presets:
            return self.presets[preset_id]
        if preset_id in self.broken:
            raise self.broken[preset_id]
        closest = difflib.get_close_matches(preset_id, self.presets, n=3, cutoff=0.5)
        listed = closest or [preset.id for preset in self.presets.values() if preset.visible]
        raise UserError(
            f'There is no preset "{preset_id}".', f"{'Closest' if closest else 'Known'}: {', '.join(listed)}."
        )

    def grouped(self) -> list[tuple[str, list[Preset]]]:
        """(family label, its visible presets by name), families in their own order."""
        infos = sorted(self.families.infos.items(), key=lambda item: item[1])
        groups = [
            (
                label,
                [preset for preset in self.presets.values() if preset.family == family and preset.visible],
            )
            for family, (_, label) in infos
        ]
        return [(label, sorted(presets, key=lambda preset: preset.name)) for label, presets in groups if presets]


def load_presets(folders: Sequence[Path], families: Families) -> PresetCollection:
    """Read all presets: the first folder holds the program's own, the others (if they exist) the user's.

    Raises UserError for a mistake in the first folder. A user's file with a mistake is left out and told in
    `problems`.
    """
    library = _Library(families)
    for number, folder in enumerate(folders):
        for path in sorted(folder.glob("*.json")):
            library.add(path, is_users=number > 0)
    presets = library.build_all()
    return PresetCollection(presets=presets, problems=library.problems, broken=library.broken, families=families)


class _Library:
    """Definitions as they are read from files, and which of the user's files had to be left out."""

    def __init__(self, families: Families) -> None:
        self.problems: list[str] = []
        self.broken: dict[str, UserError] = {}
        self._definitions = Definitions(families)
        self._layers = self._definitions.layers
        self._seen: dict[tuple[bool, str], Path] = {}

    def add(self, path: Path, *, is_users: bool) -> None:
        """Read one file. A wrong one raises UserError if it is the program's own, else becomes a problem."""
        try:
            self._refuse_twin(path, is_users)
            layer = read_layer(path, is_users)
        except UserError as error:
            if not is_users:
                raise
            self._leave_out(path.stem, error)
            return
        self._layers.setdefault(path.stem, []).append(layer)

    def build_all(self) -> dict[str, Preset]:
        """Build every preset; a user's layer that cannot be used is dropped, the rest built without it."""
        while True:
            try:
                return {preset_id: build(self._definitions, preset_id) for preset_id in self._layers}
            except BrokenDefinition as error:
                culprit = self._nearest_users(error.owner)
                if culprit is None:
                    raise UserError(error.message, error.hint) from error
                path = self._layers[culprit].pop().path
                if not self._layers[culprit]:
                    del self._layers[culprit]
                because = "" if culprit == error.owner else f"{path}: with this file, "
                self._leave_out(culprit, UserError(because + error.message, error.hint))

    def _nearest_users(self, preset_id: str) -> str | None:
        """The nearest preset with a user's layer, this one first and then along its references."""
        reached = [preset_id]
        for name in reached:
            layers = self._layers.get(name)
            if layers and layers[-1].is_users:
                return name
            values = self._definitions.model(name).values() if layers else ()
            texts = [item for value in values for item in (value if isinstance(value, list) else [value])]
            references = [text.partition("#")[0] for text in texts if isinstance(text, str)]
            reached += [reference for reference in references if reference not in reached]
        return None

    def _leave_out(self, preset_id: str, error: UserError) -> None:
        self.problems.append(f"{error} This file is left out.")
        self.broken[preset_id] = error

    def _refuse_twin(self, path: Path, is_users: bool) -> None:
        """Ids that differ only in case would share one settings file where file names ignore case."""
        twin = self._seen.setdefault((is_users, path.stem.casefold()), path)
        if twin != path:
            raise UserError(f"{path}: {twin} already has this preset id.", "Rename or remove one of the two files.")

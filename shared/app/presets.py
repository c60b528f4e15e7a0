"""Presets: JSON files of defaults/ and finetunes/ made into checked `Preset`s, and the choice of their files.

A preset file's "model" part says which weights to use; every other top-level key is a default setting
(Wan2GP's schema, described in defaults/README.md). The file's stem is the preset's id. A later folder's file
with the same id is laid over the earlier one key by key, so finetunes/ overrides defaults/.
"""

from __future__ import annotations

import copy
import difflib
import functools
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.loras import Strength, parse_strength
from shared.app.schema import (
    SETTING_KEYS,
    SETTINGS_VERSION,
    check_model_keys,
    check_setting_keys,
    describe,
    read_json_object,
)
from shared.quant.errors import UserError
from shared.utils.hf import build_hf_url

if TYPE_CHECKING:
    from shared.app.device import DeviceInfo
    from shared.app.families import Families

GB = 10**9  # bytes, as the Hub counts
# Which alternative a preference takes, in order; tokens are looked for in the lower-cased file name.
_PREFERENCE_TOKENS = {"int8": ("int8", "fp8"), "fp8": ("fp8", "int8")}
# What can be asked for where a preset has alternatives of a file; "bf16" takes the first, the plain one.
QUANTIZATIONS = ("bf16", *_PREFERENCE_TOKENS)
_COMPARE = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "": operator.eq,
}
# Place in "gigabytes" -> the key whose files it speaks of, and their role.
_SIZED: Mapping[str, tuple[str, str]] = {
    "transformer": ("URLs", "transformer"),
    "modules": ("modules", "module"),
    "text_encoder": ("text_encoder_URLs", "text_encoder"),
    "VAE": ("VAE_URLs", "vae"),
}
_USER_CONFIG = 3  # the user's config is the fourth of the comma-separated positions in the setting "config"


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """A LoRA file (name below the LoRA folder, path or URL) and its strength in Wan2GP's notation."""

    file: str
    multiplier: str = "1"

    def strength(self) -> Strength:
        """The strength as numbers. Raises UserError for what is none."""
        return parse_strength(self.multiplier)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileWant:
    """A file that must be on this machine: its source, its purpose, its folder below the checkpoint root.

    published: bytes of it (of a file with several parts: of this part) by the preset, None where it does not say.
    """

    url: str
    role: str  # "transformer", "module", "text_encoder", "vae", "companion" or "preload"
    subfolder: str = ""
    published: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """The files chosen for a preset, as URLs or paths. `vae` is empty if the family finds its own.

    published: bytes by role and URL, as the preset states them.
    """

    transformer: str
    modules: tuple[str, ...] = ()
    text_encoder: str = ""
    text_encoder_folder: str = ""  # below the checkpoint root, or "file:..."; the tokenizer lies there too
    vae: str = ""
    extra: tuple[FileWant, ...] = ()
    published: Mapping[tuple[str, str], int] = field(default_factory=dict)

    @property
    def wants(self) -> tuple[FileWant, ...]:
        """Every file of the plan, the transformer first."""
        parts = [FileWant(url=self.transformer, role="transformer")]
        parts += [FileWant(url=url, role="module") for url in self.modules]
        if self.text_encoder:
            folder = "" if self.text_encoder_folder.startswith("file:") else self.text_encoder_folder
            parts.append(FileWant(url=self.text_encoder, role="text_encoder", subfolder=folder))
        if self.vae:
            parts.append(FileWant(url=self.vae, role="vae"))
        return (*(replace(part, published=self.published.get((part.role, part.url))) for part in parts), *self.extra)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A model to choose: its weights (references resolved), capabilities and default settings.

    urls, text_encoder_urls, vae_urls: alternatives of one file each. modules: alternatives per module.
    model_def: the handler's definition with the JSON's "model" on top. settings: host key -> default value.
    companions: further files the family needs. published: bytes of weights files by role and URL, as far as they are
    stated. configs: name -> this preset with that set of model keys.
    files: the JSON files it came from, later ones laid over earlier ones. notes: what in them does nothing.
    """

    id: str
    name: str
    architecture: str
    family: str
    description: str
    urls: tuple[str, ...]
    modules: tuple[tuple[str, ...], ...]
    text_encoder_urls: tuple[str, ...]
    vae_urls: tuple[str, ...]
    preload_urls: tuple[str, ...]
    loras: tuple[LoraChoice, ...]
    companions: tuple[FileWant, ...]
    published: Mapping[tuple[str, str], int] = field(default_factory=dict)
    model_def: Mapping[str, Any]
    settings: Mapping[str, Any]
    configs: Mapping[str, Preset] = field(default_factory=dict)
    visible: bool = True
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def configured(self, selection: str) -> Preset:
        """The preset with the set of model keys that the setting "config" names (",,,name", or just "name").

        An unknown name means the preset itself, as in Wan2GP: a saved choice may outlive the set it names.
        """
        positions = selection.split(",")
        name = positions[_USER_CONFIG] if len(positions) > _USER_CONFIG else positions[0]
        return self.configs.get(name.strip(), self)


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


def choose_files(
    preset: Preset,
    preference: str = "",
    device: DeviceInfo | None = None,
    *,
    text_encoder_preference: str | None = None,
) -> FilePlan:
    """One file of each list of alternatives, by Wan2GP's rule.

    preference: "int8" or "fp8" takes such a file if there is one; else the first is taken, the plain one.
    text_encoder_preference: the same for the text encoder (None: as `preference`).
    """
    dtype = _compute_dtype(preset, device)
    vae = _pick(preset.vae_urls, preference, dtype)
    companions = list(preset.companions)
    if not vae:
        own_vae = next((want for want in companions if want.role == "vae"), None)
        vae = own_vae.url if own_vae else ""
    return FilePlan(
        transformer=_pick(preset.urls, preference, dtype),
        modules=tuple(_pick(urls, preference, dtype) for urls in preset.modules),
        text_encoder=_pick(
            preset.text_encoder_urls,
            preference if text_encoder_preference is None else text_encoder_preference,
            dtype,
        ),
        text_encoder_folder=preset.model_def.get("text_encoder_folder") or "",
        vae=vae,
        extra=(
            *(want for want in companions if want.role != "vae"),
            *(_preload_want(url) for url in preset.preload_urls),
        ),
        published=preset.published,
    )


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


def _pick(urls: Sequence[str], preference: str, dtype: str) -> str:
    """The alternative that fits the preference, among those the one named after `dtype`; else the first."""
    tokens = _PREFERENCE_TOKENS.get(preference, ())
    fitting = [url for token in tokens for url in urls if token in _file_name(url).lower()]
    named = [url for url in fitting if dtype in _file_name(url).lower()]
    return next(iter(named or fitting or urls), "")


def _compute_dtype(preset: Preset, device: DeviceInfo | None) -> str:
    """What the preset demands, else "bf16", or "fp16" on a GPU that lacks bf16 (before capability 8.0)."""
    if preset.model_def.get("dtype"):
        return str(preset.model_def["dtype"])
    old_gpu = device is not None and device.capability is not None and device.capability < 80
    return "fp16" if old_gpu else "bf16"


def _file_name(url: str) -> str:
    return url.partition("|")[0].replace("\\", "/").rsplit("/", 1)[-1]


def _preload_want(url: str) -> FileWant:
    """Wan2GP writes "URL|folder"; "%lora_dir" there is the LoRA folder."""
    address, _, folder = url.partition("|")
    return FileWant(url=address, role="preload", subfolder="loras" if folder == "%lora_dir" else folder)


def _companion_files(handler: Any, architecture: str, model_def: Mapping[str, Any]) -> tuple[FileWant, ...]:
    """The handler's list of further files, one by one."""
    answer = handler.query_model_files(lambda name: [_file_name(name)] if name else [], architecture, model_def) or []
    wants = []
    for repository in answer if isinstance(answer, list) else [answer]:
        folders = repository["sourceFolderList"]
        targets = repository.get("targetFolderList") or [None] * len(folders)
        for source, target, names in zip(folders, targets, repository["fileList"], strict=True):
            subfolder = "/".join(part for part in (target, source) if part)
            for name in names:
                # The contract does not say which of the files is the VAE; its name does, in every family so
                # far.
                is_vae = name.endswith(".safetensors") and "vae" in name.lower()
                wants.append(
                    FileWant(
                        url=build_hf_url(repository["repoId"], source, name),
                        role="vae" if is_vae else "companion",
                        subfolder=subfolder,
                    )
                )
    return tuple(wants)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """One preset file, checked by itself."""

    path: Path
    is_users: bool
    model: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str]


class _BrokenDefinition(UserError):
    """A preset cannot be built; `owner` is the id of the definition that holds the mistake."""

    def __init__(self, owner: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.owner = owner


class _Library:
    """The layers of all presets by id, and what is needed to resolve references between them."""

    def __init__(self, families: Families) -> None:
        self.families = families
        self.layers: dict[str, list[_Layer]] = {}
        self.problems: list[str] = []
        self.broken: dict[str, UserError] = {}
        self._seen: dict[tuple[bool, str], Path] = {}

    def add(self, path: Path, *, is_users: bool) -> None:
        """Read one file. A wrong one raises UserError if it is the program's own, else becomes a problem."""
        try:
            self._refuse_twin(path, is_users)
            layer = _read_layer(path, is_users)
        except UserError as error:
            if not is_users:
                raise
            self._leave_out(path.stem, error)
            return
        self.layers.setdefault(path.stem, []).append(layer)

    def build_all(self) -> dict[str, Preset]:
        """Build every preset; a user's layer that cannot be used is dropped, the rest built without it."""
        while True:
            try:
                return {preset_id: self._build(preset_id) for preset_id in self.layers}
            except _BrokenDefinition as error:
                culprit = self._nearest_users(error.owner)
                if culprit is None:
                    raise UserError(error.message, error.hint) from error
                path = self.layers[culprit].pop().path
                if not self.layers[culprit]:
                    del self.layers[culprit]
                because = "" if culprit == error.owner else f"{path}: with this file, "
                self._leave_out(culprit, UserError(because + error.message, error.hint))

    def _nearest_users(self, preset_id: str) -> str | None:
        """The nearest preset with a user's layer, this one first and then along its references."""
        reached = [preset_id]
        for name in reached:
            layers = self.layers.get(name)
            if layers and layers[-1].is_users:
                return name
            values = self._model(name).values() if layers else ()
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

    def _model(self, preset_id: str) -> dict[str, Any]:
        """The JSONs' "model" parts laid over each other."""
        return functools.reduce(_laid_over, (layer.model for layer in self.layers[preset_id]), {})

    def _definition(self, preset_id: str) -> dict[str, Any]:
        """The handler's definition with the JSON's "model" on top."""
        model = self._model(preset_id)
        architecture = model.get("architecture")
        if architecture is None:
            raise self._error(preset_id, 'the "model" part has no "architecture".', "Name one: z_image, for instance.")
        try:
            handler = self.families.handler(architecture)
        except UserError as error:
            raise self._error(preset_id, error.message, error.hint) from error
        return (handler.query_model_def(architecture, model) or {}) | model

    def _error(self, preset_id: str, message: str, hint: str = "") -> _BrokenDefinition:
        return _BrokenDefinition(preset_id, f"{self.layers[preset_id][-1].path}: {message}", hint)

    def _inherited(self, preset_id: str, definition: Mapping[str, Any], key: str) -> Any:
        """The value of a model key; a text is the id of another preset, whose value is used, and so on."""
        value, chain = definition.get(key), [preset_id]
        while isinstance(value, str):
            owner = chain[-1]
            if value in chain:
                circle = " -> ".join([*chain[chain.index(value) :], value])
                raise self._error(owner, f'"{key}" refers to itself: {circle}.')
            self._require_preset(owner, key, value)
            chain.append(value)
            value = self._definition(value).get(key)
        return value or []

    def _require_preset(self, owner: str, key: str, reference: str) -> None:
        if reference in self.layers:
            return
        if "/" in reference or reference.endswith((".safetensors", ".sft")):
            raise self._error(owner, f'"{key}" must be a list: write ["{reference}"].')
        closest = difflib.get_close_matches(reference, self.layers, n=1)
        raise self._error(
            owner,
            f'"{key}" refers to the preset "{reference}", which does not exist.',
            f'The closest is "{closest[0]}".' if closest else "",
        )

    def _stated_sizes(self, definition: Mapping[str, Any], place: str) -> list[list[float]]:
        """Gigabytes of the alternatives of each file of one place, in their order.

        By the preset's own word, else that of the preset whose files it takes.
        """
        key = _SIZED[place][0]
        while True:
            stated = (definition.get("gigabytes") or {}).get(place)
            files = definition.get(key)
            if stated is not None or not isinstance(files, str):
                sizes = stated if isinstance(stated, list) else [] if stated is None else [stated]
                files_of_place = sizes if place == "modules" else [sizes]
                return [size if isinstance(size, list) else [size] for size in files_of_place]
            definition = self._definition(files)  # no circle: the files themselves were resolved before

    def _modules(self, preset_id: str, definition: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
        """Alternatives of each module. Named modules are not the preset's own: it lends them ("id#name")."""
        modules = self._inherited(preset_id, definition, "modules")
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
            raise self._error(owner, f'"modules" refers to itself: {" -> ".join([*chain, item])}.')
        reference, _, name = item.partition("#")
        self._require_preset(owner, "modules", reference)
        modules = self._inherited(reference, self._definition(reference), "modules")
        if name and isinstance(modules, Mapping) and name in modules:
            return self._module(reference, modules[name], (*chain, item))
        if not name and isinstance(modules, Sequence) and len(modules) == 1:
            return self._module(reference, modules[0], (*chain, item))
        has = f"names {', '.join(modules)}" if isinstance(modules, Mapping) else f"a list of {len(modules)}"
        raise self._error(owner, f'"modules" asks for "{item}", but "{reference}" has {has}.')

    def _build(self, preset_id: str) -> Preset:
        definition = self._definition(preset_id)
        preset = self._build_from(preset_id, definition)
        sets = self._inherited(preset_id, definition, "configs") or {}
        configs = {
            name: self._build_from(preset_id, _laid_over(definition, self._checked_config(preset_id, name, keys)))
            for name, keys in sets.items()
            if not name.startswith("_")
        }
        return replace(preset, configs=configs)

    def _checked_config(self, preset_id: str, name: str, keys: dict[str, Any]) -> dict[str, Any]:
        try:
            check_model_keys(f'{self.layers[preset_id][-1].path}, config "{name}"', keys)
        except UserError as error:
            raise _BrokenDefinition(preset_id, error.message, error.hint) from error
        # "name" and "description" label the choice; the preset keeps its own.
        return {key: value for key, value in keys.items() if key not in ("name", "description", "architecture")}

    def _build_from(self, preset_id: str, definition: dict[str, Any]) -> Preset:
        layers = self.layers[preset_id]
        architecture = definition["architecture"]
        handler = self.families.handler(architecture)
        urls = tuple(self._inherited(preset_id, definition, "URLs"))
        if not urls:
            raise self._error(preset_id, 'no weights: the "model" part has no "URLs".')
        vae_urls = definition.get("VAE_URLs")
        if isinstance(vae_urls, str) and vae_urls not in self.layers:
            definition = definition | {"VAE_URLs": [vae_urls]}  # here, unlike elsewhere, a text may be the file itself
        loras = self._inherited(preset_id, definition, "loras")
        modules = self._modules(preset_id, definition)
        encoder_urls = tuple(self._inherited(preset_id, definition, "text_encoder_URLs"))
        vae_urls = tuple(self._inherited(preset_id, definition, "VAE_URLs"))
        companions = _companion_files(handler, architecture, definition)
        own_vae = tuple(want.url for want in companions if want.role == "vae")[:1]
        alternatives = {
            "transformer": [urls], "modules": modules, "text_encoder": [encoder_urls], "VAE": [vae_urls or own_vae],
        }  # fmt: skip
        published = {
            (_SIZED[place][1], url): round(size * GB)
            for place, files in alternatives.items()
            for among, sizes in zip(files, self._stated_sizes(definition, place), strict=False)
            for url, size in zip(among, sizes, strict=False)
        }
        return Preset(
            id=preset_id,
            name=definition.get("name") or preset_id,
            architecture=architecture,
            family=self.families.family_of(architecture),
            description=definition.get("description") or "",
            urls=urls,
            modules=modules,
            text_encoder_urls=encoder_urls,
            vae_urls=vae_urls,
            preload_urls=tuple(self._inherited(preset_id, definition, "preload_URLs")),
            loras=pair_loras(loras, self._inherited(preset_id, definition, "loras_multipliers")),
            companions=companions,
            published=published,
            model_def=definition,
            settings=_default_settings(handler, architecture, definition, layers),
            visible=bool(definition.get("visible", True)),
            files=tuple(layer.path for layer in layers),
            notes=tuple(note for layer in layers for note in layer.notes),
        )


def pair_loras(files: Sequence[str], multipliers: Sequence[Any]) -> tuple[LoraChoice, ...]:
    """LoRA files with their strengths in order; missing strengths are 1."""
    padded = [*multipliers, *["1"] * len(files)]
    return tuple(LoraChoice(file, str(multiplier)) for file, multiplier in zip(files, padded, strict=False))


def _laid_over(model: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """A definition with further keys on top; sizes do not outlast the files that they were stated of."""
    merged = {**model, **further}
    if model.get("gigabytes") and "gigabytes" not in further:
        stated = model["gigabytes"]
        merged["gigabytes"] = {place: size for place, size in stated.items() if _SIZED[place][0] not in further}
    return merged


def _read_layer(path: Path, is_users: bool) -> _Layer:
    settings = read_json_object(path)
    model = settings.pop("model", None)
    if not isinstance(model, dict):
        got = "none" if model is None else describe(model)
        raise UserError(f'{path}: a preset needs a "model" object, got {got}.', "See defaults/README.md.")
    notes = check_model_keys(str(path), model) + check_setting_keys(str(path), settings)
    return _Layer(path=path, is_users=is_users, model=model, settings=settings, notes=notes)


def _default_settings(
    handler: Any, architecture: str, definition: Mapping[str, Any], layers: Sequence[_Layer]
) -> dict[str, Any]:
    """The program's defaults, then the architecture's, then the files'; null leaves what was before."""
    settings: dict[str, Any] = {name: key.default for name, key in SETTING_KEYS.items()}
    handler.update_default_settings(architecture, definition, settings)
    version = SETTINGS_VERSION
    for layer in layers:
        given = {key: value for key, value in layer.settings.items() if value is not None}
        settings.update(copy.deepcopy(given))
        version = given.get("settings_version", version)
    if hasattr(handler, "fix_settings"):
        handler.fix_settings(architecture, version, definition, settings)
    return settings

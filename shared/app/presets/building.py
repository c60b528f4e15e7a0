"""A preset made of its definition: references followed, sizes looked up, default settings filled in."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shared.app.presets.choosing import file_name
from shared.app.presets.definitions import BrokenDefinition, Definitions
from shared.app.presets.layers import SIZED, Layer, laid_over
from shared.app.presets.preset import GB, FileWant, Preset, pair_loras
from shared.app.schema import SETTING_KEYS, SETTINGS_VERSION, check_model_keys
from shared.quant.errors import UserError
from shared.utils.hf import build_hf_url


def build(definitions: Definitions, preset_id: str) -> Preset:
    """The preset with this id, and with each of its configs. Raises BrokenDefinition for a mistake in a file."""
    definition = definitions.definition(preset_id)
    preset = _build_from(definitions, preset_id, definition)
    sets = definitions.inherited(preset_id, definition, "configs") or {}
    configs = {
        name: _build_from(
            definitions, preset_id, laid_over(definition, _checked_config(definitions, preset_id, name, keys))
        )
        for name, keys in sets.items()
        if not name.startswith("_")
    }
    return replace(preset, configs=configs)


def _checked_config(definitions: Definitions, preset_id: str, name: str, keys: dict[str, Any]) -> dict[str, Any]:
    try:
        check_model_keys(f'{definitions.layers[preset_id][-1].path}, config "{name}"', keys)
    except UserError as error:
        raise BrokenDefinition(preset_id, error.message, error.hint) from error
    # "name" and "description" label the choice; the preset keeps its own.
    return {key: value for key, value in keys.items() if key not in ("name", "description", "architecture")}


def _build_from(definitions: Definitions, preset_id: str, definition: dict[str, Any]) -> Preset:
    """The preset as `definition`, its own or with a config on top, says."""
    layers = definitions.layers[preset_id]
    architecture = definition["architecture"]
    handler = definitions.families.handler(architecture)
    urls = tuple(definitions.inherited(preset_id, definition, "URLs"))
    if not urls:
        raise definitions.error(preset_id, 'no weights: the "model" part has no "URLs".')
    vae_urls = definition.get("VAE_URLs")
    if isinstance(vae_urls, str) and vae_urls not in definitions.layers:
        definition = definition | {"VAE_URLs": [vae_urls]}  # here, unlike elsewhere, a text may be the file itself
    loras = definitions.inherited(preset_id, definition, "loras")
    modules = definitions.modules(preset_id, definition)
    encoder_urls = tuple(definitions.inherited(preset_id, definition, "text_encoder_URLs"))
    vae_urls = tuple(definitions.inherited(preset_id, definition, "VAE_URLs"))
    companions = _companion_files(handler, architecture, definition)
    own_vae = tuple(want.url for want in companions if want.role == "vae")[:1]
    alternatives = {
        "transformer": [urls],
        "modules": modules,
        "text_encoder": [encoder_urls],
        "VAE": [vae_urls or own_vae],
    }
    return Preset(
        id=preset_id,
        name=definition.get("name") or preset_id,
        architecture=architecture,
        family=definitions.families.family_of(architecture),
        description=definition.get("description") or "",
        urls=urls,
        modules=modules,
        text_encoder_urls=encoder_urls,
        vae_urls=vae_urls,
        preload_urls=tuple(definitions.inherited(preset_id, definition, "preload_URLs")),
        loras=pair_loras(loras, definitions.inherited(preset_id, definition, "loras_multipliers")),
        companions=companions,
        published=_published(definitions, definition, alternatives),
        model_def=definition,
        settings=_default_settings(handler, architecture, definition, layers),
        visible=bool(definition.get("visible", True)),
        files=tuple(layer.path for layer in layers),
        notes=tuple(note for layer in layers for note in layer.notes),
    )


def _published(
    definitions: Definitions, definition: Mapping[str, Any], alternatives: Mapping[str, Sequence[Sequence[str]]]
) -> dict[tuple[str, str], int]:
    """Bytes of files by role and URL, as far as they are stated. alternatives: of each file, by place."""
    return {
        (SIZED[place][1], url): round(size * GB)
        for place, files in alternatives.items()
        for among, sizes in zip(files, definitions.stated_sizes(definition, place), strict=False)
        for url, size in zip(among, sizes, strict=False)
    }


def _companion_files(handler: Any, architecture: str, model_def: Mapping[str, Any]) -> tuple[FileWant, ...]:
    """The handler's list of further files, one by one."""
    answer = handler.query_model_files(lambda name: [file_name(name)] if name else [], architecture, model_def) or []
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


def _default_settings(
    handler: Any, architecture: str, definition: Mapping[str, Any], layers: Sequence[Layer]
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

"""Model families: every `models/<family>/<family>_handler.py`, and what the handlers say of themselves."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from shared.quant.errors import UserError

if TYPE_CHECKING:
    import argparse

# A handler without one of these cannot be used by any host that speaks the contract.
REQUIRED_METHODS = (
    "query_supported_types",
    "query_family_maps",
    "query_model_family",
    "query_family_infos",
    "query_model_def",
    "query_model_files",
    "get_lora_dir",
    "load_model",
    "update_default_settings",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Families:
    """All handlers found and their merged maps.

    handlers: architecture -> handler class. infos: family -> (sort key, low first; label).
    equivalents: architecture -> the one it stands for, both ways. compatible: architecture -> others that
    also accept its settings, one way.
    """

    handlers: Mapping[str, Any]
    infos: Mapping[str, tuple[int, str]]
    equivalents: Mapping[str, str]
    compatible: Mapping[str, frozenset[str]]

    def handler(self, architecture: str) -> Any:
        """Handler class of an architecture. Raises UserError naming the closest architecture known."""
        if architecture not in self.handlers:
            closest = difflib.get_close_matches(architecture, self.handlers, n=1)
            raise UserError(
                f'unknown architecture "{architecture}"' + (f', the closest is "{closest[0]}".' if closest else "."),
                f"Known: {', '.join(self.handlers)}.",
            )
        return self.handlers[architecture]

    def family_of(self, architecture: str) -> str:
        """Family id of an architecture."""
        return str(self.handler(architecture).query_model_family())

    def are_compatible(self, given: str, wanted: str) -> bool:
        """Whether settings made for the architecture `given` may be used with `wanted`."""
        given = self.equivalents.get(given, given)
        wanted = self.equivalents.get(wanted, wanted)
        return given == wanted or wanted in self.compatible.get(given, frozenset())

    def register_cli_args(self, parser: argparse.ArgumentParser, lora_root: str) -> None:
        """Let every family add its own flags, once per family."""
        done: set[str] = set()
        for handler in self.handlers.values():
            family = handler.query_model_family()
            if family not in done and hasattr(handler, "register_lora_cli_args"):
                handler.register_lora_cli_args(parser, lora_root)
            done.add(family)


def load_families(models_folder: Path) -> Families:
    """Import every handler below `models_folder`, whose parent must be importable.

    Raises UserError if a handler lacks a method of the contract, or if two claim the same architecture.
    """
    handlers: dict[str, Any] = {}
    infos: dict[str, tuple[int, str]] = {}
    equivalents: dict[str, str] = {}
    compatible: dict[str, frozenset[str]] = {}
    for path in sorted(models_folder.glob("*/*_handler.py")):
        if path.stem != f"{path.parent.name}_handler":
            continue
        handler = _import_handler(f"{models_folder.name}.{path.parent.name}.{path.stem}", path)
        for architecture in handler.query_supported_types():
            if architecture in handlers:
                other = handlers[architecture].__module__
                raise UserError(f'{path}: the architecture "{architecture}" is already served by {other}.')
            handlers[architecture] = handler
        infos.update(handler.query_family_infos())
        equivalent, compatible_with = handler.query_family_maps()
        equivalents.update(equivalent)
        compatible.update({name: frozenset(others) for name, others in compatible_with.items()})
    return Families(
        handlers=MappingProxyType(handlers),
        infos=MappingProxyType(infos),
        equivalents=MappingProxyType(equivalents),
        compatible=MappingProxyType(compatible),
    )


def _import_handler(module_name: str, path: Path) -> Any:
    handler = getattr(importlib.import_module(module_name), "family_handler", None)
    if handler is None:
        raise UserError(f"{path}: no class named family_handler.")
    missing = [name for name in REQUIRED_METHODS if not callable(getattr(handler, name, None))]
    if missing:
        raise UserError(f"{path}: family_handler lacks {', '.join(missing)}.")
    return handler

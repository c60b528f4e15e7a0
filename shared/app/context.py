"""AppContext: everything a front end works with, made once from the command line's flags and handed around."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.choices import SAFER_FILE, SaferChoices
from shared.app.download import FileStore, default_hub_cache
from shared.app.families import Families, load_families
from shared.app.memory import give_freed_memory_back
from shared.app.metadata import write_file
from shared.app.presets import Preset, PresetCollection, load_presets
from shared.app.prompt_cache import DEFAULT_LIMIT_MB, PromptCache
from shared.app.schema import read_json_object
from shared.app.session import ModelSession
from shared.quant.errors import UserError
from shared.utils.files_locator import set_checkpoints_paths

if TYPE_CHECKING:
    from shared.app.settings import GenerationSettings

DEFAULT_PRESET = "z_image_demo"
"""The preset whose weights come with the program: it draws on a fresh machine without a download."""

CONFIG_FILE = "wgp_config.json"
DEFAULT_CHECKPOINTS_FOLDER = "ckpts"
DEFAULT_LORA_ROOT = "lora_root"
DEFAULT_OUTPUT_FOLDER = "outputs"
DEFAULT_SETTINGS_FOLDER = "settings"
PROMPT_FOLDER = ".cache/prompts"

# Keys of wgp_config.json that are ours; all others belong to Wan2GP and are kept as they are.
CONFIG_KEYS = (
    "last_model_type",
    "checkpoints_paths",
    "save_path",
    "profile",
    "offload",
    "max_vram",
    "attention",
    "compute",
    "transformer_quantization",
    "text_encoder_quantization",
    "prompt_cache_mb",
)


def default_root() -> Path:
    """The program's own folder: where wgp.py, models/ and defaults/ are."""
    return Path(__file__).resolve().parents[2]


@dataclass(slots=True, kw_only=True)
class AppContext:
    """Folders, configuration, families, presets, files and the one model session.

    root: the program's folder. args: the parsed flags, with defaults where none was given.
    config: the values of CONFIG_KEYS that wgp_config.json holds. Change it through `save_config`.
    """

    root: Path
    args: argparse.Namespace
    config_path: Path
    config: dict[str, Any]
    families: Families
    presets: PresetCollection
    files: FileStore
    lora_root: Path
    settings_folder: Path
    output_folder: Path
    session: ModelSession = field(init=False)

    def __post_init__(self) -> None:
        self.session = ModelSession(self)

    @classmethod
    def create(
        cls,
        args: argparse.Namespace | None = None,
        root: Path | None = None,
        families: Families | None = None,
    ) -> AppContext:
        """Read the configuration and the presets. Loads no model and imports no torch.

        args: flags; a missing one takes its default. Relative folders of the flags are relative to the working folder,
        those of defaults to the program's folder. families: those already found while the flags were defined.
        Raises UserError for a broken configuration or a broken file in defaults/.
        """
        give_freed_memory_back()
        root = root or default_root()
        args = args or argparse.Namespace()
        flag = vars(args).get
        config_path = Path(flag("config") or root) / CONFIG_FILE
        config = read_config(config_path)
        roots = [root / DEFAULT_CHECKPOINTS_FOLDER]
        roots += [root / path for path in config.get("checkpoints_paths") or ()]  # an absolute path replaces the root
        roots += [Path(path).expanduser().absolute() for path in flag("ckpts") or ()]
        roots = list(dict.fromkeys(roots))
        set_checkpoints_paths([str(path) for path in roots])
        families = families or load_families(root / "models")
        return cls(
            root=root,
            args=args,
            config_path=config_path,
            config=config,
            families=families,
            presets=_load_presets(root, families),
            files=FileStore(root, roots, hub_cache=default_hub_cache()),
            lora_root=_folder(root, flag("loras"), None, DEFAULT_LORA_ROOT),
            settings_folder=_folder(root, flag("settings"), None, DEFAULT_SETTINGS_FOLDER),
            output_folder=_folder(root, flag("output_dir"), config.get("save_path"), DEFAULT_OUTPUT_FOLDER),
        )

    def refresh_presets(self) -> PresetCollection:
        """Read defaults/ and finetunes/ again. On an error the presets stay as they are."""
        self.presets = _load_presets(self.root, self.families)
        return self.presets

    def lora_folder(self, preset: Preset) -> Path:
        """Where the LoRA files of the preset's family are kept."""
        handler = self.families.handlers[preset.architecture]
        return Path(handler.get_lora_dir(preset.architecture, self.args, str(self.lora_root)))

    def saved_settings(self, preset: Preset) -> dict[str, Any]:
        """The user's own defaults for a preset, from the settings folder; {} when there are none.

        Raises UserError when the file is there and cannot be read.
        """
        path = self.settings_path(preset)
        return read_json_object(path) if path.is_file() else {}

    def save_settings(self, preset: Preset, settings: GenerationSettings) -> Path:
        """Make these settings the user's defaults for the preset; returns the file written."""
        path = self.settings_path(preset)
        _write_json(path, settings.as_record())
        return path

    def prompt_cache(self) -> PromptCache | None:
        """Where encoded prompts are kept, as large as the flag or the configuration allows; None for 0, which is off.

        Raises UserError for a size that is none.
        """
        asked = getattr(self.args, "prompt_cache", None)
        size = self.config.get("prompt_cache_mb", DEFAULT_LIMIT_MB) if asked is None else asked
        if not isinstance(size, int) or size < 0:
            raise UserError(f'"prompt_cache_mb" must be a whole number of MB, got {size}.', "0 turns the cache off.")
        return PromptCache(self.root / PROMPT_FOLDER, size * 10**6) if size else None

    def safer_choices(self) -> SaferChoices:
        """What bad numbers made necessary, by weights file and device."""
        return SaferChoices(self.settings_folder / SAFER_FILE)

    def settings_path(self, preset: Preset) -> Path:
        return self.settings_folder / f"{preset.id}_settings.json"

    def save_config(self, **changes: Any) -> None:
        """Remember values out of CONFIG_KEYS in wgp_config.json; keys of others in that file stay untouched."""
        unknown = sorted(set(changes) - set(CONFIG_KEYS))
        if unknown:
            raise ValueError(f"not keys of {CONFIG_FILE}: {unknown}; known: {CONFIG_KEYS}")
        on_disk = read_json_object(self.config_path) if self.config_path.is_file() else {}
        if all(on_disk.get(key) == value for key, value in changes.items()):
            return
        _write_json(self.config_path, on_disk | changes)
        self.config |= changes


def read_config(path: Path) -> dict[str, Any]:
    """Our keys of a wgp_config.json; {} when there is none. Raises UserError naming the file if it is broken."""
    if not path.is_file():
        return {}
    return {key: value for key, value in read_json_object(path).items() if key in CONFIG_KEYS}


def _load_presets(root: Path, families: Families) -> PresetCollection:
    return load_presets([root / "defaults", root / "finetunes"], families)


def _folder(root: Path, flag: str | None, configured: str | None, default: str) -> Path:
    """A flag's folder (relative to the working folder) before the configured one and the default (below `root`)."""
    return Path(flag).expanduser().absolute() if flag else root / (configured or default)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=4, ensure_ascii=False) + "\n"
    write_file(path, lambda file: file.write(text.encode("utf-8")))

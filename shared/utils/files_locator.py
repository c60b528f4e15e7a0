"""Find model files and folders on this machine (names, arguments and return types as in Wan2GP).

Checkpoint roots are searched in order; the first one is also where downloads go. A name may be a path below a
root, an absolute path, a URL (its last part is looked for) or "file:..." (a path below the program's own
folder).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

DEFAULT_CHECKPOINT_PATHS = ("ckpts", ".")
PROGRAM_FOLDER = Path(__file__).resolve().parents[2]

# The host's interface is a set of functions over one list of roots; this is that list, changed only by the
# setter below.
_roots: list[str] = list(DEFAULT_CHECKPOINT_PATHS)


def set_checkpoints_paths(checkpoints_paths: Iterable[str]) -> None:
    """Replace the checkpoint roots; empty entries are skipped, and an empty list restores the defaults."""
    given = [path.strip() for path in checkpoints_paths]
    _roots[:] = [path for path in given if path] or DEFAULT_CHECKPOINT_PATHS


def get_download_location(
    file_name: str | None = None, force_path: str | Sequence[str] | None = None, lora_dir: str | None = None
) -> str:
    """Where a file is to be stored: below the first root, in `force_path` if given. No name: the folder
    itself.

    lora_dir: what "%lora_dir" stands for in a "URL|%lora_dir" address.
    """
    if force_path is not None and not isinstance(force_path, str):
        force_path = force_path[0] if force_path else None
    folder = os.path.join(_roots[0], force_path) if force_path else _roots[0]
    if file_name is None:
        return folder
    return os.path.join(folder, _local_name(file_name, lora_dir))


def locate_folder(folder_name: str, error_if_none: bool = True) -> str | None:
    """Path of a folder below a root. Raises FileNotFoundError with the places searched, or returns None."""
    tried = _candidates(folder_name, ())
    found = next((path for path in tried if os.path.isdir(path)), None)
    if found is None and error_if_none:
        raise FileNotFoundError(_not_found("folder", folder_name, tried))
    return found


def locate_file(
    file_name: str,
    create_path_if_none: bool = False,
    error_if_none: bool = True,
    extra_paths: str | Sequence[str] | None = None,
) -> str | None:
    """Path of a file below a root or in one of `extra_paths` (folders, or folders below a root).

    If it is nowhere: the path where a download should put it (`create_path_if_none`), else FileNotFoundError
    with the places searched, or None.
    """
    extra = (extra_paths,) if isinstance(extra_paths, str) else tuple(extra_paths or ())
    tried = _candidates(file_name, extra)
    found = next((path for path in tried if os.path.isfile(path)), None)
    if found is not None:
        return found
    if create_path_if_none:
        return get_download_location(file_name)
    if error_if_none:
        raise FileNotFoundError(_not_found("file", file_name, tried))
    return None


def _candidates(name: str, extra: Sequence[str]) -> list[str]:
    if name.startswith("file:"):
        return [str(PROGRAM_FOLDER / name.removeprefix("file:"))]
    name = _local_name(name, None)
    if os.path.isabs(name):
        return [name]
    below_roots = [os.path.join(root, folder) for folder in extra if not os.path.isabs(folder) for root in _roots]
    return [os.path.join(folder, name) for folder in (*_roots, *extra, *below_roots)]


def _local_name(name: str, lora_dir: str | None) -> str:
    """The path below a root for a URL ("https://host/a/b.sft|folder" -> "folder/b.sft"); others stay."""
    if not name.startswith(("http://", "https://")):
        return name
    url, _, folder = name.partition("|")
    file_name = url.partition("?")[0].rsplit("/", 1)[-1]
    if folder == "%lora_dir":
        if lora_dir is None:
            raise ValueError(f"{name}: %lora_dir needs a LoRA folder, and none was given")
        folder = os.path.abspath(lora_dir)
    elif os.path.isabs(folder) or ".." in folder.replace("\\", "/").split("/"):
        raise ValueError(f"{name}: the folder after '|' must lie below a checkpoint root, got {folder!r}")
    return os.path.join(folder, file_name)


def _not_found(kind: str, name: str, tried: Sequence[str]) -> str:
    places = ", ".join(os.path.abspath(path) for path in tried)
    return f"The {kind} {name} was not found. Looked at: {places}"

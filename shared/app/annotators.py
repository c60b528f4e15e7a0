"""Files of the preprocessors that have a model of their own: found or fetched, and verified before they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shared.app.download import DownloadProgress, FileStore
from shared.preprocess import FILES, Preprocessor
from shared.quant.errors import CheckpointError

if TYPE_CHECKING:
    from shared.app.edit_settings import EditSettings

FOLDER = "annotators"  # below the first checkpoint root, one folder in it for each preprocessor


def annotator_of(edit: EditSettings) -> str:
    """The preprocessor with a model that these settings need; "" for none."""
    is_used = bool(edit.image_guide) or edit.tile_scale > 1
    return edit.control_preprocessor if is_used and edit.control_preprocessor in FILES else ""


def folder_of(name: str) -> str:
    """Where a preprocessor's files are kept below the first checkpoint root."""
    return f"{FOLDER}/{name}"


def missing_megabytes(store: FileStore, edit: EditSettings) -> float:
    """What `fetch` would download for these settings, in 10^6 bytes."""
    name = annotator_of(edit)
    absent = [file for file in FILES.get(name, ()) if store.find(file.url, subfolder=folder_of(name)) is None]
    return sum(file.megabytes for file in absent)


def fetch(
    store: FileStore,
    edit: EditSettings,
    *,
    on_progress: Callable[[DownloadProgress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Preprocessor:
    """The preprocessor of these settings with its files on this machine, downloaded first where they are missing.

    Raises what FileStore.ensure() raises, and CheckpointError for a file whose hash is not the expected one.
    """
    name = annotator_of(edit)
    paths = []
    for file in FILES.get(name, ()):
        path = store.ensure(file.url, subfolder=folder_of(name), on_progress=on_progress, should_stop=should_stop)
        if file.sha256 and (found := store.sha256(path)) != file.sha256:
            raise CheckpointError(
                f"{path} is not the file that the {name} preprocessor was written for: its SHA-256 is {found}, "
                f"expected {file.sha256}.",
                "Delete or rename it; the right one is then downloaded.",
            )
        paths.append(path)
    return Preprocessor(name or edit.control_preprocessor, tuple(paths))

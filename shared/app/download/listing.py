"""Files below a root by their name, listed when they are needed."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Folders are listed this deep below a root: ComfyUI/models/diffusion_models/<own folder>/<own folder>.
SEARCH_DEPTH = 5
SEARCH_FOLDERS = 5000  # a root like "/" is not searched to its end
LISTING_SECONDS = 5.0  # a listing is renewed after this time when a file is not in it


class Listing:
    """The files below a root by their lower-case name, listed when first needed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, list[Path]] = {}
        self._listed: float | None = None

    def named(self, name: str) -> list[Path]:
        key = name.lower()
        stale = self._listed is None or time.monotonic() - self._listed > LISTING_SECONDS
        if key not in self._files and stale:
            self._list()
        return self._files.get(key, [])

    def _list(self) -> None:
        files: dict[str, list[Path]] = {}  # other threads look into the old listing until this one is whole
        for visited, (folder, subfolders, names) in enumerate(os.walk(self._root, followlinks=True), start=1):
            depth = len(Path(folder).relative_to(self._root).parts)
            if depth >= SEARCH_DEPTH or visited >= SEARCH_FOLDERS:
                subfolders.clear()
            subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__")))
            for name in names:
                files.setdefault(name.lower(), []).append(Path(folder, name))
        self._files, self._listed = files, time.monotonic()

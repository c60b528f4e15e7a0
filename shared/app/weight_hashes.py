"""Which weights files a picture was drawn with: their SHA-256, for its record."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from shared.app.plan import PlannedFile
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import RunError

WEIGHT_ROLES = ("transformer", "module", "text_encoder", "vae", "lora")  # files whose hashes a record keeps


class WeightHashes:
    """SHA-256 of files, computed in the background while the model loads: the bytes are read from disk only once."""

    def __init__(self, sha256: Callable[[Path], str], paths: Sequence[Path]) -> None:
        self._sha256 = sha256
        self._paths = paths
        self._found: list[dict[str, str]] = []
        self._error: OSError | None = None
        # A daemon: an interrupted program does not wait until 12 GB are hashed.
        self._thread = threading.Thread(target=self._hash_all, name="sha256", daemon=True)
        self._thread.start()

    def _hash_all(self) -> None:
        try:
            for path in self._paths:
                self._found.append({"path": str(path), "sha256": self._sha256(path)})
        except OSError as error:
            self._error = error

    def result(self) -> list[dict[str, str]]:
        """Path and hash of each file, waited for. Raises RunError when one cannot be read."""
        self._thread.join()
        if self._error is not None:
            raise RunError(f"A weights file could not be read: {self._error}.") from self._error
        return self._found


def weights_of(files: Iterable[PlannedFile]) -> list[Path]:
    """Every weights file on disk once, shards one by one."""
    paths = [file.path for file in files if file.role in WEIGHT_ROLES and file.path is not None]
    return list(dict.fromkeys(part for path in paths for part in Checkpoint.open(path).files))

"""What is remembered of files: where a download came from, and hashes that took time."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from shared.app.hub import (
    HubFile,
)

_REMEMBER_SECONDS = 5.0  # to wait for another process that writes the same few lines


class Remembered:
    """A value for a file, by its path, size and time of change, kept in a JSON file of the program folder."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()

    def get(self, path: Path) -> Any:
        """The value; None when there is none, or when the file has changed since."""
        with self._lock:
            match self._read().get(str(path.resolve())):
                case [size, time_ns, value] if path.exists() and [size, time_ns] == _stamp(path):
                    return value
        return None

    def put(self, path: Path, value: Any, stamp: list[int] | None = None) -> None:
        """Remember a JSON-able value. stamp: of the file as it was when the value was true (None: now)."""
        from filelock import FileLock

        entry = {str(path.resolve()): [*(stamp or _stamp(path)), value]}
        fresh = self._file.with_name(f"{self._file.name}.{os.getpid()}.part")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # Another process may remember something at the same time: neither is to write over the other's.
            with self._lock, FileLock(f"{self._file}.lock", timeout=_REMEMBER_SECONDS):
                fresh.write_text(json.dumps(self._read() | entry, indent=1), encoding="utf-8")
                os.replace(fresh, self._file)
        except OSError:
            return  # a read-only program folder, or a lock that nobody gives back: then it is not known next time

    def _read(self) -> dict[str, object]:
        try:
            known = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


class HashCache:
    """SHA-256 of files; forgetting one costs only time."""

    def __init__(self, file: Path) -> None:
        self._known = Remembered(file)

    def known(self, path: Path) -> str | None:
        digest = self._known.get(path)
        return digest if isinstance(digest, str) else None

    def get(self, path: Path) -> str:
        if digest := self.known(path):
            return digest
        with path.open("rb") as file:
            stamp, digest = _stamp(path), hashlib.file_digest(file, "sha256").hexdigest()
        self._known.put(path, digest, stamp)
        return digest

    def put(self, path: Path, digest: str) -> None:
        self._known.put(path, digest)


def origin_of(file: HubFile) -> list[str]:
    """What is remembered of a download."""
    return [file.repo_id, file.revision, file.path]


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]

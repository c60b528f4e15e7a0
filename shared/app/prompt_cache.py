"""Encoded prompts on the disk: a prompt drawn before needs neither the text encoder's time nor its memory.

One safetensors file for each prompt and encoder, named by a hash of both. The folder is bounded; what was used longest
ago goes first. A file that cannot be read is removed and counts as not there, and a folder that cannot be written
leaves the program as it is without a cache: nothing here may keep a picture from being drawn.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shared.app.metadata import write_file
from shared.quant.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

DEFAULT_LIMIT_MB = 256  # about 500 prompts of 100 tokens for Qwen3-4B, at 5 KB a token
SUFFIX = ".safetensors"
_TENSOR = "features"


class PromptCache:
    """Features (tokens, width) by key, in a folder of at most `limit` bytes. Several processes may share it."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def load(self, key: str) -> Tensor | None:
        """The features kept under the key, on the CPU; None when there are none or their file is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self._path(key)
        try:
            # Read, not mapped: the file may be removed by another process while the features are in use.
            features = load(path.read_bytes()).get(_TENSOR)
            if features is None or features.dim() != 2 or not bool(features.isfinite().all()):
                raise ValueError("it does not hold a prompt")
            os.utime(path)  # used now
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, KeyError) as error:
            logger.warning("%s: removed from the prompt cache, because %s.", path.name, error)
            path.unlink(missing_ok=True)
            return None
        except OSError as error:
            logger.warning("%s cannot be read (%s); the prompt is encoded anew.", path, error.strerror)
            return None
        return features

    def save(self, key: str, features: Tensor) -> None:
        """Keep features under the key, and remove the longest unused of the others as far as the limit demands."""
        from safetensors.torch import save

        data = save({_TENSOR: features.detach().cpu().contiguous()})
        if len(data) > self.limit:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._shrink_to(self.limit - len(data))
            write_file(self._path(key), lambda file: file.write(data))
        except (OSError, RunError) as error:
            logger.warning("%s: the encoded prompt was not kept (%s).", self.folder, error)

    def _shrink_to(self, limit: int) -> None:
        files = self._files()
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of each; one that another process removes meanwhile is left out."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        return found

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


class EncoderPrompts:
    """The part of a cache that belongs to one encoder: the store that a family's `prompt_store` asks.

    identity: what tells the encoder's weights, number type and device from any other's, None while it is being found
    out. Prompts that are encoded before it is known wait for `flush`.
    """

    def __init__(self, cache: PromptCache, identity: Callable[[], str | None]) -> None:
        self._cache, self._identity = cache, identity
        self._waiting: dict[str, Tensor] = {}

    def load(self, key: str) -> Tensor | None:
        """The features that this encoder gave for the key, None when they are not known."""
        identity = self._identity()
        return None if identity is None else self._cache.load(_combined(identity, key))

    def save(self, key: str, features: Tensor) -> None:
        """Keep what this encoder gave for the key."""
        self._waiting[key] = features
        self.flush()

    def flush(self) -> None:
        """Write what waits, if the encoder's identity is known by now."""
        identity = self._identity() if self._waiting else None
        if identity is None:
            return
        for key, features in self._waiting.items():
            self._cache.save(_combined(identity, key), features)
        self._waiting.clear()


def _combined(identity: str, key: str) -> str:
    return hashlib.sha256(f"{identity} {key}".encode()).hexdigest()

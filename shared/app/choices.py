"""Safer ways to compute that bad numbers once made necessary: remembered for a weights file on a device.

A card whose attention gives NaN for one model gives it every time. Without this file each picture would break first and
be repaired after. Choices are kept in SAFER_FILE in the settings folder, by the content of the weights file (not its
name or place) and the name of the device; deleting the file, or an entry, forgets them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from shared.app.device import DeviceInfo
from shared.app.metadata import write_file
from shared.app.schema import read_json_object
from shared.quant.checkpoint import Checkpoint

SAFER_FILE = "safer_choices.json"

_SAMPLE_BYTES = 1 << 16


class SaferChoices:
    """What is remembered in one file, which is read and written at each call: several programs may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self, weights: Path, device: DeviceInfo) -> Mapping[str, str]:
        """Name of a choice ("attention", "compute", "dtype") -> why; {} when there are none.

        Raises UserError when the file is there and cannot be read.
        """
        entries = self._entries()
        if not entries:
            return {}
        entry = entries.get(_key(weights, device))
        choices = entry.get("choices") if isinstance(entry, dict) else None
        return {str(name): str(why) for name, why in choices.items()} if isinstance(choices, dict) else {}

    def remember(self, weights: Path, device: DeviceInfo, choices: Mapping[str, str]) -> None:
        """Add choices (name -> why) to those of this file and device. Raises RunError when the disk refuses."""
        known = {**self.find(weights, device), **choices}
        entry = {"file": weights.name, "device": device.name, "choices": known}
        entries = {**self._entries(), _key(weights, device): entry}
        text = json.dumps(entries, indent=4, ensure_ascii=False) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._path, lambda file: file.write(text.encode("utf-8")))

    def _entries(self) -> dict[str, object]:
        return read_json_object(self._path) if self._path.is_file() else {}


def _key(weights: Path, device: DeviceInfo) -> str:
    return f"{identity(weights)} {device.kind} {device.name}"


def identity(weights: Path) -> str:
    """What tells this content from any other without reading 12 GB: length, beginning and end of every file of it."""
    digest = hashlib.sha256()
    for path in Checkpoint.open(weights).files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(size - _SAMPLE_BYTES, 0))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]

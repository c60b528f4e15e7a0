"""What is to be fetched before a plan can be followed, and whether it fits the disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.plan.files import PlannedFile
from shared.app.presets import GB

if TYPE_CHECKING:
    from shared.app.context import AppContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """What is to be fetched before a plan can be followed.

    nbytes: still to come, of the files whose size is published; received: of the same, here already. small: how many
    tokenizer and configuration files are not counted. unknown: addresses of others that are not. folder: where it
    goes. free: bytes there, None where not known.
    """

    files: int
    nbytes: int
    received: int
    small: int
    unknown: tuple[str, ...]
    folder: Path
    free: int | None

    @property
    def is_too_large(self) -> bool:
        """Whether it is known not to fit the disk."""
        return self.free is not None and self.nbytes > self.free

    @property
    def words(self) -> str:
        """In one line, for people: how much, what is not counted, and whether the disk is too small."""
        count = "1 file" if self.files == 1 else f"{self.files} files"
        if not self.nbytes:
            return f"{count} of unknown size"
        uncounted = [f"{self.small} small"] if self.small else []
        uncounted += [f"{len(self.unknown)} of unknown size"] if self.unknown else []
        amount = f"{_gb(self.nbytes)} in {count}"
        amount += f", of them {' and '.join(uncounted)} not counted" if uncounted else ""
        amount += f"; {_gb(self.received)} more are here already" if self.received else ""
        if self.free is None or not self.is_too_large:
            return amount
        return f"{amount}. Only {_gb(self.free)} are free at {self.folder}: {_gb(self.nbytes - self.free)} too few"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "files": self.files,
            "bytes": self.nbytes,
            "received": self.received,
            "unknown": list(self.unknown),
            "folder": str(self.folder),
            "free": self.free,
            "fits": not self.is_too_large,
        }


def find_download(ctx: AppContext, files: Sequence[PlannedFile]) -> Download | None:
    """What of these files is to be fetched, None if nothing is."""
    missing = [file for file in files if file.path is None and file.is_remote]
    if not missing:
        return None
    folder = ctx.files.roots[0]
    existing = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), None)
    uncounted = {file.url: file.role for file in missing if file.published is None}
    return Download(
        files=len({file.url for file in missing}),
        nbytes=sum(file.to_come for file in missing),
        received=sum(file.received for file in missing if file.published is not None),
        small=sum(role == "companion" for role in uncounted.values()),
        unknown=tuple(url for url, role in uncounted.items() if role != "companion"),
        folder=folder,
        free=None if existing is None else shutil.disk_usage(existing).free,
    )


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 1e6:.1f} MB"

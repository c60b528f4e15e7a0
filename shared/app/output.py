"""Where pictures go: the file or folder the user named, checked before work begins, and a name for each picture."""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from shared.app.metadata import FORMATS
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.settings import GenerationSettings

DEFAULT_SUFFIX = ".png"
_SLUG_LENGTH = 50  # characters; with date and seed a name stays well below every file system's 255 bytes


@dataclass(frozen=True, slots=True)
class OutputPlace:
    """A folder, or one file in it. template: its name, maybe with "{seed}" and "{index}"; None: a made-up one."""

    folder: Path
    template: str | None = None

    def prepare(self) -> None:
        """Make the folder and try it. Raises UserError if a picture could not be written there."""
        target = self.folder / self.template if self.template else None
        if target is not None and target.exists() and not os.access(target, os.W_OK):
            raise UserError(f"{target} exists and is read-only.", "Choose another --output.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written: {error.strerror}.", "Choose another --output or --output-dir."
            ) from error

    def path_for(self, settings: GenerationSettings, index: int, created: datetime) -> Path:
        """Where picture `index` of a batch goes. In a folder no file is ever replaced; a file named by the user is."""
        if self.template is not None:
            name = self.template.replace("{seed}", str(settings.seed)).replace("{index}", str(index + 1))
            return self.folder / name
        stamp = created.strftime("%Y-%m-%d-%Hh%Mm%Ss")
        stem = f"{stamp}_seed{settings.seed}" + "".join(f"_{slug}" for slug in [slug_of(settings.prompt)] if slug)
        path, copies = self.folder / f"{stem}{DEFAULT_SUFFIX}", 1
        while path.exists():
            copies += 1
            path = self.folder / f"{stem}_{copies}{DEFAULT_SUFFIX}"
        return path


def resolve_output(output: Path | str | None, default_folder: Path, images: int) -> OutputPlace:
    """What the user's --output means: a folder (existing, ending in a slash, or without a suffix) or a file.

    A file's suffix chooses the format (FORMATS). For a batch its name needs "{seed}" or "{index}"; where both are
    missing, "_{index}" is added. None: the default folder. Raises UserError for another suffix.
    """
    if output is None or str(output) == "":
        return OutputPlace(default_folder)
    path = Path(output).expanduser()
    if path.is_dir() or str(output).endswith(("/", "\\")) or not path.suffix:
        return OutputPlace(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(
            f"--output {output}: pictures are not saved as {path.suffix}.",
            f"Use one of {', '.join(FORMATS)}, or end a folder's name with a slash.",
        )
    name = path.name
    if images > 1 and "{seed}" not in name and "{index}" not in name:
        name = f"{path.stem}_{{index}}{path.suffix}"
    return OutputPlace(path.parent, name)


def slug_of(prompt: str) -> str:
    """The prompt as part of a file name: letters and digits of any script in lower case, joined by dashes."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).lower().replace("_", " "))
    return "-".join(words)[:_SLUG_LENGTH].strip("-")

"""Files found on this machine: where an address says, by their names below the roots, in the Hub's cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.app.download.listing import Listing
from shared.app.download.names import (
    checked,
    common_end,
    existing,
    is_generic,
    is_url,
    name_in,
    repository_place,
    whole_file,
)
from shared.app.download.remembered import Remembered, origin_of
from shared.app.hub import (
    HubFile,
    parse_hub_url,
)


def default_hub_cache() -> Path:
    """The Hugging Face cache folder, where huggingface_hub has it (not imported for this: it takes time)."""
    environ = os.environ
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


@dataclass(frozen=True, slots=True)
class Located:
    """Where a file is on this machine (None: nowhere), and what is to be known about that choice, "" for nothing."""

    path: Path | None
    note: str = ""


class Finder:
    """Looks into the program's folder, the roots in their order, and a Hugging Face cache; see FileStore.

    origins: where downloads came from: a file that is known to be another's is not taken.
    """

    def __init__(
        self, program_folder: Path, roots: Sequence[Path], hub_cache: Path | None, endpoint: str, origins: Remembered
    ) -> None:
        self._program_folder = program_folder
        self._roots = roots
        self._hub_cache = hub_cache
        self._endpoint = endpoint
        self._origins = origins
        self._listings = {root: Listing(root) for root in roots}

    def locate(self, url_or_path: str, subfolder: str) -> Located:
        """The file on this machine, and how sure that is; see FileStore.locate."""
        if url_or_path.startswith("file:"):
            return Located(existing(self.program_file(url_or_path)))
        if not is_url(url_or_path):
            return Located(self._find_path(url_or_path, subfolder))
        file = parse_hub_url(url_or_path, self._endpoint)
        if file is None:
            return Located(self._find_named(name_in(url_or_path), subfolder))
        others: list[str] = []
        if found := self._find_named(file.name, subfolder, file, others):
            known = self._origin(found) or repository_place(file).parts[0] in found.parts
            return Located(found, "" if known else "taken by its name: nothing here says where it is from")
        return Located(self._find_in_hub_cache(file), "; ".join(dict.fromkeys(others)))

    def program_file(self, address: str) -> Path:
        """Where a "file:" address points."""
        return self._program_folder / address.removeprefix("file:").removeprefix("//")

    def _find_path(self, path: str, subfolder: str) -> Path | None:
        local = Path(os.path.expanduser(path))  # Path.expanduser raises where there is no such user
        if local.is_absolute():
            return existing(local)
        places = (*(root / local for root in self._roots), self._program_folder / local)
        for place in places:
            if found := existing(place):
                return found
        return self._find_named(local.name, subfolder) if local.name == path else None

    def _find_named(
        self, name: str, subfolder: str, file: HubFile | None = None, others: list[str] | None = None
    ) -> Path | None:
        """A file by its name: in the subfolder, at the top, then anywhere below a root.

        A generic name counts only in the subfolder or in a folder of its repository's name. A file that is known to
        be another one does not count; `others` gets a sentence on it.
        """

        def is_it(path: Path) -> bool:
            if file is None or not self.is_another(path, file):
                return True
            if others is not None:
                repository, *_ = self._origin(path) or [""]
                others.append(f"{path} has the same name, but is from {repository}")
            return False

        generic = is_generic(name)
        places = [checked(subfolder) / name] if subfolder or not generic else []
        if generic and file is not None:
            places.append(repository_place(file))
        elif not generic:
            places.append(Path(name))
        for root in self._roots:
            for place in places:
                if (found := whole_file(root / place)) and is_it(found):
                    return found
        for root in self._roots if not generic else ():
            seen = {root / place for place in places}
            hits = [hit for hit in self._listings[root].named(name) if hit not in seen and whole_file(hit)]
            if hits := [hit for hit in hits if is_it(hit)]:
                like = file.path if file else name
                return max(hits, key=lambda hit: (common_end(hit, like), -len(hit.parts)))
        return None

    def _origin(self, path: Path) -> list[str] | None:
        """Repository, revision and path that a file was downloaded from; None for one that came otherwise."""
        found = self._origins.get(path)
        return found if isinstance(found, list) and len(found) == 3 else None

    def is_another(self, path: Path, file: HubFile) -> bool:
        """Whether a file is known to be a different one than the Hub's."""
        origin = self._origin(path)
        return origin is not None and origin != origin_of(file)

    def _find_in_hub_cache(self, file: HubFile) -> Path | None:
        """Look into the cache by its documented layout: refs/<branch> names a snapshot of links to files."""
        if self._hub_cache is None:
            return None
        repo = self._hub_cache / f"models--{file.repo_id.replace('/', '--')}"
        try:
            commit = (repo / "refs" / file.revision).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            commit = file.revision  # an address may name a commit itself
        return whole_file(repo / "snapshots" / commit / file.path)

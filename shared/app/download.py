"""Where weights files are: found on this machine first, downloaded into the first root when missing.

Files are found by their names, as in Wan2GP, so that its folders and ComfyUI's can be used. Repositories share names,
though (`z_image_turbo_nvfp4.safetensors` is two different files), so the origin of every download is remembered in
.cache/origins.json: a file that is known to come from elsewhere is never taken for another, and the other one is
downloaded into a folder of its repository's name. A file that somebody else put there has no known origin; it is taken
by its name, and `locate` says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from shared.app.hub import (
    DownloadCancelled,
    DownloadProgress,
    HubFile,
    ShouldStop,
    by_hand,
    download,
    hub_endpoint,
    parse_hub_url,
    received_bytes,
)
from shared.quant.errors import RunError, UserError

__all__ = ["DownloadCancelled", "DownloadProgress", "FileStore", "default_hub_cache"]

# Folders are listed this deep below a root: ComfyUI/models/diffusion_models/<own folder>/<own folder>.
SEARCH_DEPTH = 5
SEARCH_FOLDERS = 5000  # a root like "/" is not searched to its end
LISTING_SECONDS = 5.0  # a listing is renewed after this time when a file is not in it

_REMEMBER_SECONDS = 5.0  # to wait for another process that writes the same few lines

# Names that say nothing about the model: they count only inside a folder that names their repository.
GENERIC_STEM = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model|adapter_model|pytorch_lora_weights|lora|transformer|vae"
    r"|text_encoder|(model_)?index|config|generation_config|preprocessor_config|scheduler_config"
    r"|tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template|vocab|merges|README)"
    r"([-_.](fp16|bf16|fp32))?(-\d{5}-of-\d{5})?(\.safetensors\.index)?",
    re.IGNORECASE,
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


class FileStore:
    """Finds the files that presets name, and downloads those that are missing.

    program_folder holds the files that belong to the program ("file:" addresses). roots are searched in
    order; downloads go into the first. Further roots may be Wan2GP's ckpts folder or ComfyUI's models folder:
    their subfolders are searched too. hub_cache is a Hugging Face cache (default_hub_cache()) or None.
    """

    def __init__(
        self,
        program_folder: Path,
        roots: Sequence[Path],
        hub_cache: Path | None = None,
        *,
        endpoint: str | None = None,
    ) -> None:
        if not roots:
            raise ValueError("FileStore needs at least one root: downloads go into the first")
        self.program_folder = program_folder
        self.roots = tuple(roots)
        self.hub_cache = hub_cache
        self.endpoint = endpoint or hub_endpoint()
        self._listings = {root: _Listing(root) for root in self.roots}
        self._hashes = _HashCache(program_folder / ".cache" / "sha256.json")
        self._origins = _Remembered(program_folder / ".cache" / "origins.json")

    def find(self, url_or_path: str, *, subfolder: str = "") -> Path | None:
        """The file on this machine, or None; see `locate`."""
        return self.locate(url_or_path, subfolder=subfolder).path

    def locate(self, url_or_path: str, *, subfolder: str = "") -> Located:
        """The file on this machine, and how sure that is. Uses no network.

        url_or_path: a Hub address, "file:" and a path inside the program folder, or a path: absolute, or
        relative to a root. subfolder: where below the first root a download would go; looked at first.
        """
        if url_or_path.startswith("file:"):
            return Located(_existing(self._program_file(url_or_path)))
        if not _is_url(url_or_path):
            return Located(self._find_path(url_or_path, subfolder))
        file = parse_hub_url(url_or_path, self.endpoint)
        if file is None:
            return Located(self._find_named(_name_in(url_or_path), subfolder))
        others: list[str] = []
        if found := self._find_named(file.name, subfolder, file, others):
            known = self._origin(found) or _repository_place(file).parts[0] in found.parts
            return Located(found, "" if known else "taken by its name: nothing here says where it is from")
        return Located(self._find_in_hub_cache(file), "; ".join(dict.fromkeys(others)))

    def target(self, url: str, *, subfolder: str = "") -> Path:
        """Where a download of this address goes (and where to put the file by hand)."""
        file = parse_hub_url(url, self.endpoint)
        if file is not None and not subfolder and _is_generic(file.name):
            return self.roots[0] / _repository_place(file)
        place = self.roots[0] / _checked(subfolder) / (file.name if file else _name_in(url))
        if file is not None and self._is_another(place, file):
            return self.roots[0] / _repository_place(file)
        return place

    def ensure(
        self,
        url_or_path: str,
        *,
        subfolder: str = "",
        on_progress: Callable[[DownloadProgress], None] | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Path:
        """The file on this machine, downloaded first when it is missing.

        should_stop is asked several times a second. Raises UserError and RunError with what to do by hand,
        and DownloadCancelled; what has arrived is continued by the next call, in this run or a later one.
        """
        if found := self.find(url_or_path, subfolder=subfolder):
            return found
        file = self._hub_file_or_raise(url_or_path, subfolder)
        target = self.target(url_or_path, subfolder=subfolder)
        with self._only_one(target, on_progress, should_stop):
            if not _whole_file(target):  # another process may have brought it while this one waited
                sha256 = download(
                    file, target, endpoint=self.endpoint, on_progress=on_progress, should_stop=should_stop
                )
                self._hashes.put(target, sha256)
                self._origins.put(target, _origin_of(file))
        return target

    def received(self, url: str, *, subfolder: str = "") -> int:
        """Bytes of this file that a download brought before it was cut short: what the next one continues.

        A file that has changed on the Hub meanwhile begins anew; that is known when the Hub is asked.
        """
        if parse_hub_url(url, self.endpoint) is None:
            return 0
        return received_bytes(self.target(url, subfolder=subfolder))

    def sha256(self, path: Path) -> str:
        """A file's SHA-256 as 64 hex digits; a 12 GB file is read once, then known by its size and time."""
        return self._hashes.get(path)

    def known_sha256(self, path: Path) -> str | None:
        """The same if it was computed before and the file has not changed since; reads no file."""
        return self._hashes.known(path)

    # ------------------------------------------------------------------------------------ finding

    def _program_file(self, address: str) -> Path:
        return self.program_folder / address.removeprefix("file:").removeprefix("//")

    def _find_path(self, path: str, subfolder: str) -> Path | None:
        local = Path(os.path.expanduser(path))  # Path.expanduser raises where there is no such user
        if local.is_absolute():
            return _existing(local)
        places = (*(root / local for root in self.roots), self.program_folder / local)
        for place in places:
            if found := _existing(place):
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
            if file is None or not self._is_another(path, file):
                return True
            if others is not None:
                repository, *_ = self._origin(path) or [""]
                others.append(f"{path} has the same name, but is from {repository}")
            return False

        generic = _is_generic(name)
        places = [_checked(subfolder) / name] if subfolder or not generic else []
        if generic and file is not None:
            places.append(_repository_place(file))
        elif not generic:
            places.append(Path(name))
        for root in self.roots:
            for place in places:
                if (found := _whole_file(root / place)) and is_it(found):
                    return found
        for root in self.roots if not generic else ():
            seen = {root / place for place in places}
            hits = [hit for hit in self._listings[root].named(name) if hit not in seen and _whole_file(hit)]
            if hits := [hit for hit in hits if is_it(hit)]:
                like = file.path if file else name
                return max(hits, key=lambda hit: (_common_end(hit, like), -len(hit.parts)))
        return None

    def _origin(self, path: Path) -> list[str] | None:
        """Repository, revision and path that a file was downloaded from; None for one that came otherwise."""
        found = self._origins.get(path)
        return found if isinstance(found, list) and len(found) == 3 else None

    def _is_another(self, path: Path, file: HubFile) -> bool:
        """Whether a file is known to be a different one than the Hub's."""
        origin = self._origin(path)
        return origin is not None and origin != _origin_of(file)

    def _find_in_hub_cache(self, file: HubFile) -> Path | None:
        """Look into the cache by its documented layout: refs/<branch> names a snapshot of links to files."""
        if self.hub_cache is None:
            return None
        repo = self.hub_cache / f"models--{file.repo_id.replace('/', '--')}"
        try:
            commit = (repo / "refs" / file.revision).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            commit = file.revision  # an address may name a commit itself
        return _whole_file(repo / "snapshots" / commit / file.path)

    # ------------------------------------------------------------------------------------ downloading

    def _hub_file_or_raise(self, address: str, subfolder: str) -> HubFile:
        if address.startswith("file:"):
            raise UserError(
                f"{self._program_file(address)} is missing, although it belongs to the program.",
                "Restore it from the repository.",
            )
        if not _is_url(address):
            folders = ", ".join(str(root) for root in self.roots)
            raise UserError(
                f"{address} is not on this machine; looked in {folders}.",
                "Put it into one of these folders, or name its folder with --ckpts.",
            )
        file = parse_hub_url(address, self.endpoint)
        if file is None:
            raise UserError(
                f"{address} is no address of a file on the Hugging Face Hub (https://huggingface.co/OWNER/REPO/"
                "resolve/main/FILE), and other addresses cannot be downloaded.",
                by_hand(address, self.target(address, subfolder=subfolder)),
            )
        return file

    @contextmanager
    def _only_one(
        self, target: Path, on_progress: Callable[[DownloadProgress], None] | None, should_stop: ShouldStop | None
    ) -> Iterator[None]:
        """Keep a second process (the page beside a command) from writing the same file.

        on_progress: told how far the first one is, while this one waits for it.
        """
        from filelock import FileLock, Timeout

        folder = self.roots[0] / ".cache" / "locks"
        place = target.relative_to(self.roots[0]).as_posix().replace("/", "--")
        lock = FileLock(folder / f"{place}.lock")
        while not lock.is_locked:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=0.2)
            except Timeout:
                if should_stop is not None and should_stop():
                    message = f"Stopped waiting for another download of {target.name}."
                    raise DownloadCancelled(message) from None
                if on_progress is not None:
                    on_progress(DownloadProgress(target.name, received_bytes(target), None, 0.0))
            except OSError as error:
                raise RunError(
                    f"{target.name} cannot be saved below {self.roots[0]}: {error.strerror or error}.",
                    "Make that folder writable, or put the file into another one and name that with --ckpts.",
                ) from error
        try:
            yield
        finally:
            lock.release()


class _Listing:
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


class _Remembered:
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


class _HashCache:
    """SHA-256 of files; forgetting one costs only time."""

    def __init__(self, file: Path) -> None:
        self._known = _Remembered(file)

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


def _origin_of(file: HubFile) -> list[str]:
    """What is remembered of a download."""
    return [file.repo_id, file.revision, file.path]


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _is_url(address: str) -> bool:
    return address.startswith(("https://", "http://"))


def _is_generic(name: str) -> bool:
    return GENERIC_STEM.fullmatch(name.rpartition(".")[0] or name) is not None


def _repository_place(file: HubFile) -> Path:
    """Where below a root a file lies whose name says nothing: under its repository's name."""
    return Path(file.repo_id.split("/")[1], file.path)


def _name_in(url: str) -> str:
    try:
        return PurePosixPath(urlsplit(url).path).name
    except ValueError:  # no address at all: "https://[..."
        return PurePosixPath(url).name


def _checked(subfolder: str) -> Path:
    path = Path(subfolder)
    if path.anchor or ".." in path.parts:
        raise UserError(f'"{subfolder}" is not a folder below the checkpoint folder.', "Use a relative name.")
    return path


def _existing(path: Path) -> Path | None:
    return path if os.path.exists(path) else None  # Path.exists raises where a name is too long


def _whole_file(path: Path) -> Path | None:
    """The path if it is a file with content (links into nowhere and empty leftovers are not)."""
    return path if os.path.isfile(path) and path.stat().st_size > 0 else None


def _common_end(path: Path, like: str) -> int:
    """How many last path components two paths share."""
    count = 0
    for ours, theirs in zip(reversed(path.parts), reversed(PurePosixPath(like).parts), strict=False):
        if ours.lower() != theirs.lower():
            break
        count += 1
    return count

"""Files that presets name: found, or downloaded into the first root."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shared.app.download.finding import Finder, Located
from shared.app.download.names import checked, is_generic, is_url, name_in, repository_place, whole_file
from shared.app.download.remembered import HashCache, Remembered, origin_of
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
        self._hashes = HashCache(program_folder / ".cache" / "sha256.json")
        self._origins = Remembered(program_folder / ".cache" / "origins.json")
        self._finder = Finder(program_folder, self.roots, hub_cache, self.endpoint, self._origins)

    def find(self, url_or_path: str, *, subfolder: str = "") -> Path | None:
        """The file on this machine, or None; see `locate`."""
        return self.locate(url_or_path, subfolder=subfolder).path

    def locate(self, url_or_path: str, *, subfolder: str = "") -> Located:
        """The file on this machine, and how sure that is. Uses no network.

        url_or_path: a Hub address, "file:" and a path inside the program folder, or a path: absolute, or
        relative to a root. subfolder: where below the first root a download would go; looked at first.
        """
        return self._finder.locate(url_or_path, subfolder)

    def target(self, url: str, *, subfolder: str = "") -> Path:
        """Where a download of this address goes (and where to put the file by hand)."""
        file = parse_hub_url(url, self.endpoint)
        if file is not None and not subfolder and is_generic(file.name):
            return self.roots[0] / repository_place(file)
        place = self.roots[0] / checked(subfolder) / (file.name if file else name_in(url))
        if file is not None and self._finder.is_another(place, file):
            return self.roots[0] / repository_place(file)
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
            if not whole_file(target):  # another process may have brought it while this one waited
                sha256 = download(
                    file, target, endpoint=self.endpoint, on_progress=on_progress, should_stop=should_stop
                )
                self._hashes.put(target, sha256)
                self._origins.put(target, origin_of(file))
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

    def _hub_file_or_raise(self, address: str, subfolder: str) -> HubFile:
        if address.startswith("file:"):
            raise UserError(
                f"{self._finder.program_file(address)} is missing, although it belongs to the program.",
                "Restore it from the repository.",
            )
        if not is_url(address):
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

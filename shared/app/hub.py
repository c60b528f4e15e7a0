"""One file of the Hugging Face Hub: its address, and its download, resumed and verified.

huggingface_hub looks the file up and carries the request (login, proxy, mirror, offline mode). The transfer
itself is here, because hf_hub_download (2.4) starts a cut download from zero in the next run and compares
only the length. Here the bytes go to "<name>.<hash>.part" beside the target, a later run goes on behind them,
and the file gets its name only after its hash has been compared with the one that the Hub states.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, TypeVar
from urllib.parse import quote, unquote, urlsplit

from shared.quant.errors import RunError, UserError

if TYPE_CHECKING:
    import httpx2

HUB = "https://huggingface.co"
HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})

LOOK_UP_SECONDS = 15.0  # one look-up, name resolution included: it may try eight addresses in turn
READ_SECONDS = 10.0  # a transfer that stands still for so long is taken up again
TRIES_WITHOUT_DATA = 5  # give up after so many tries in a row that brought nothing
RETRY_WAIT_SECONDS = 1.0
RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
REPORT_SECONDS = 0.1  # at most ten progress reports a second
SPEED_WINDOW_SECONDS = 5.0
DISK_MARGIN = 64 * 2**20  # bytes left free: a completely full disk stops other programs

_T = TypeVar("_T")
OnProgress = Callable[["DownloadProgress"], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far one file is: bytes done and in all (None: unknown), speed over the last seconds."""

    file: str
    done: int
    total: int | None
    bytes_per_second: float


class DownloadCancelled(RunError):
    """The user stopped a download; what has arrived is kept and continued by the next one."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file's address on the Hub: path is relative to the repository, revision a branch, tag or commit."""

    repo_id: str
    revision: str
    path: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def url(self, endpoint: str = HUB) -> str:
        return f"{endpoint}/{self.repo_id}/resolve/{quote(self.revision, safe='')}/{quote(self.path)}"


def hub_endpoint() -> str:
    """The Hub's address: HF_ENDPOINT (a mirror) or huggingface.co, without a slash at the end."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB


def parse_hub_url(url: str, endpoint: str = HUB) -> HubFile | None:
    """Read "https://huggingface.co/OWNER/REPO/resolve/REVISION/PATH" ("blob" is understood too).

    Returns None for any other address. Raises UserError for a path that would leave its folder.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # "https://[...": no address at all
        return None
    if parts.scheme not in ("http", "https") or parts.netloc not in HUB_HOSTS | {urlsplit(endpoint).netloc}:
        return None
    match parts.path.removeprefix(urlsplit(endpoint).path).strip("/").split("/", 4):
        case [owner, repo, "resolve" | "blob", revision, path] if owner and repo and revision:
            path = unquote(path)
            if not all(map(_is_plain, path.split("/"))):
                raise UserError(f"{url}: the path inside the repository is not a plain file path.")
            return HubFile(f"{owner}/{repo}", unquote(revision), path)
    return None


def by_hand(url: str, target: Path) -> str:
    """The sentence that every failed download ends with."""
    return (
        f"By hand: download {url} and save it as {target}. "
        "A folder that already holds the file can be named with --ckpts."
    )


def download(
    file: HubFile,
    target: Path,
    *,
    endpoint: str = HUB,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> str:
    """Bring one file of the Hub to target and return its SHA-256 (64 hex digits).

    target appears only when all bytes are there and verified. Raises RunError (no network, full disk, wrong
    bytes), UserError (no such file, no access) and DownloadCancelled; each says which file, from where, and
    where to put it by hand. Two downloads to one target must not run at once: the caller holds a lock.
    """
    stop = should_stop or (lambda: False)
    with _explained(file, endpoint, target):
        stated = _look_up(file, endpoint, stop)
        part = target.with_name(f"{target.name}.{stated.etag[:12]}.part")
        for stale in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
            if stale != part:  # bytes of another version of the file: nothing can continue them
                stale.unlink()
        _check_disk(file, stated, part)
        target.parent.mkdir(parents=True, exist_ok=True)
        sha256 = _receive_all(stated, part, _Meter(file.name, stated.size, on_progress), stop)
    _verify(file, stated, part, sha256, endpoint=endpoint, target=target)
    os.replace(part, target)
    return sha256


def received_bytes(target: Path) -> int:
    """Of an unfinished download to target; 0 if there is none."""
    sizes = [0]
    for part in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
        with contextlib.suppress(FileNotFoundError):  # just finished
            sizes.append(part.stat().st_size)
    return max(sizes)


# ---------------------------------------------------------------------------------------------- looking up


@dataclass(frozen=True, slots=True)
class _Stated:
    """What the Hub says about a file: the address of this very version, its hash and its size in bytes."""

    url: str
    etag: str
    size: int

    @property
    def is_sha256(self) -> bool:
        """Large files carry their SHA-256 (64 digits); small ones, kept in git itself, git's hash (40)."""
        return len(self.etag) == 64


def _look_up(file: HubFile, endpoint: str, stop: ShouldStop) -> _Stated:
    from huggingface_hub import get_hf_file_metadata

    url = file.url(endpoint)
    found = _within(LOOK_UP_SECONDS, lambda: get_hf_file_metadata(url, timeout=READ_SECONDS, endpoint=endpoint), stop)
    if found.size is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", found.etag or ""):
        raise RunError(
            f"{file.name}: {url} states no size and hash (size {found.size}, ETag {found.etag}), "
            "so a download could not be verified.",
            "If HF_ENDPOINT names a mirror, try without it.",
        )
    pinned = HubFile(file.repo_id, found.commit_hash or file.revision, file.path)
    return _Stated(pinned.url(endpoint), str(found.etag), found.size)


def _within(seconds: float, call: Callable[[], _T], stop: ShouldStop) -> _T:
    """Run call in a thread that may be left behind: no dead network or slow name server can hold us."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="hub look-up")
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive():
        thread.join(0.05)
        if stop():
            raise DownloadCancelled("Download cancelled before it began.")
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    if errors:
        raise errors[0]
    return results[0]


def _check_disk(file: HubFile, stated: _Stated, part: Path) -> None:
    missing = stated.size - (part.stat().st_size if part.exists() else 0)
    folder = next(parent for parent in part.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < missing + DISK_MARGIN:
        raise RunError(
            f"{file.name} needs {_size(missing)} more, and the disk of {part.parent} has {_size(free)} free.",
            "Free some space, or keep the file on another disk and name its folder with --ckpts.",
        )


# ---------------------------------------------------------------------------------------------- transferring


class _Part:
    """The bytes received so far under their staging name, with a running SHA-256."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("r+b" if path.exists() else "w+b")
        self._hash = hashlib.sha256()
        self.size = 0

    def take_up(self, check: Callable[[], None]) -> None:
        """Hash what an earlier run received: seconds for some gigabytes, so `check` is called every megabyte."""
        self.size = os.fstat(self._file.fileno()).st_size
        while chunk := self._file.read(2**20):
            self._hash.update(chunk)
            check()

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._hash = hashlib.sha256()
        self.size = 0

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())  # on the disk before the file gets its final name
        finally:
            self._file.close()


class _Meter:
    """Turns byte counts into progress reports, not more often than people can read them."""

    def __init__(self, name: str, total: int, on_progress: OnProgress | None) -> None:
        self.name = name
        self._total = total
        self._on_progress = on_progress
        self._marks: deque[tuple[float, int]] = deque()
        self._reported = 0.0

    def moved(self, done: int) -> None:
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self.report(done)

    def report(self, done: int) -> None:
        now = self._reported = time.monotonic()
        self._marks.append((now, done))
        while now - self._marks[0][0] > SPEED_WINDOW_SECONDS:
            self._marks.popleft()
        since, at_first = self._marks[0]
        if self._on_progress is not None:
            speed = max(0.0, (done - at_first) / (now - since)) if now > since else 0.0
            self._on_progress(DownloadProgress(self.name, done, self._total, speed))


def _receive_all(stated: _Stated, path: Path, meter: _Meter, stop: ShouldStop) -> str:
    """Append to the part until it has the stated size, taking up cut transfers again; return its SHA-256."""
    try:
        with _Part(path) as part:
            part.take_up(lambda: _stop_if_asked(stop, meter, part))
            if part.size > stated.size:
                part.restart()
            meter.report(part.size)
            _repeat_until_whole(stated, part, meter, stop)
            meter.report(part.size)
            return part.sha256()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        path.unlink(missing_ok=True)  # a full disk helps nobody, least of all the next try
        raise RunError(
            f"{meter.name}: the disk of {path.parent} became full; what had arrived was removed.",
            f"Free {_size(stated.size)}, or keep the file on another disk and name its folder with --ckpts.",
        ) from error


def _repeat_until_whole(stated: _Stated, part: _Part, meter: _Meter, stop: ShouldStop) -> None:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    tries = 0
    while part.size < stated.size:
        before = part.size
        try:
            _receive(stated, part, meter, stop)
            if part.size < stated.size:
                raise httpx2.RemoteProtocolError("the connection ended early")
        except httpx2.HTTPError as error:
            final = isinstance(error, HfHubHTTPError) and error.response.status_code not in RETRIED_STATUS
            tries = 1 if part.size > before else tries + 1
            if final or tries >= TRIES_WITHOUT_DATA:
                raise
            _wait(RETRY_WAIT_SECONDS, lambda: _stop_if_asked(stop, meter, part))


def _receive(stated: _Stated, part: _Part, meter: _Meter, stop: ShouldStop) -> None:
    """One request: append what it brings to the part, from the byte where the part ends."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    # Asked of the Hub each time, not of the storage host behind it, whose addresses expire. The HTTP client
    # follows the redirect and leaves the login behind when the host changes.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
    with get_session().stream("GET", stated.url, headers=headers, timeout=READ_SECONDS) as response:
        hf_raise_for_status(response)
        if part.size and not _continues_at(part.size, response):
            part.restart()  # the server ignored the range and sends everything
        for chunk in response.iter_bytes():
            part.write(chunk)
            meter.moved(part.size)
            _stop_if_asked(stop, meter, part)
            if part.size > stated.size:
                return  # more than stated: the hash will tell


def _continues_at(offset: int, response: httpx2.Response) -> bool:
    content_range = response.headers.get("Content-Range", "")
    return response.status_code == 206 and content_range.startswith(f"bytes {offset}-")


def _stop_if_asked(stop: ShouldStop, meter: _Meter, part: _Part) -> None:
    if stop():
        raise DownloadCancelled(
            f"Download of {meter.name} cancelled.",
            f"{_size(part.size)} are kept; the next download goes on from there.",
        )


def _wait(seconds: float, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        check()
        time.sleep(min(left, 0.1))


# ---------------------------------------------------------------------------------------------- verifying


def _verify(file: HubFile, stated: _Stated, part: Path, sha256: str, *, endpoint: str, target: Path) -> None:
    got = sha256 if stated.is_sha256 else _git_blob_hash(part)
    if got != stated.etag:
        part.unlink()
        url = file.url(endpoint)
        raise RunError(
            f"{file.name} from {url} arrived with wrong bytes and was deleted: "
            f"its hash is {got}, {urlsplit(endpoint).netloc} states {stated.etag}.",
            f"Try again; if it happens twice, a proxy or mirror alters the file. {by_hand(url, target)}",
        )


def _git_blob_hash(path: Path) -> str:
    """git's name for a file's content: SHA-1 over "blob <size>", a zero byte and the bytes."""
    data = path.read_bytes()  # at most 10 MB: the Hub keeps larger files outside git
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


# ---------------------------------------------------------------------------------------------- explaining


@contextmanager
def _explained(file: HubFile, endpoint: str, target: Path) -> Iterator[None]:
    """Turn network and Hub errors inside the block into one that says what, from where, and what to do."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except (httpx2.HTTPError, OfflineModeIsEnabled, TimeoutError) as error:
        raise _explain(error, file, endpoint, target) from error


def _explain(error: Exception, file: HubFile, endpoint: str, target: Path) -> UserError:
    from huggingface_hub import errors

    name, repo, host = file.name, file.repo_id, urlsplit(endpoint).netloc
    hint = by_hand(file.url(endpoint), target)
    login = 'log in with "hf auth login" (or set HF_TOKEN)'
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.OfflineModeIsEnabled):
        return RunError(f"{name} is not on this machine, and HF_HUB_OFFLINE forbids downloading it.", hint)
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{name}: {repo} on {host} is gated: its owner gives access account by account.",
            f"Accept the terms at {endpoint}/{repo}, {login} and try again. {hint}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f'{name}: {repo} on {host} has no revision "{file.revision}".', hint)
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return UserError(f"{name}: {repo} on {host} has no file {file.path}.", hint)
    if status in (401, 403, 404):
        return UserError(
            f"{name}: {host} answers {status}: {repo} is not there, or only some accounts may read it.",
            f"Check the address, or {login}. {hint}",
        )
    if status is not None:
        return RunError(f"{name}: {host} answers with error {status}.", f"Try again later. {hint}")
    reason = str(error) or type(error).__name__
    return RunError(f"{name} is not on this machine, and {host} cannot be reached ({reason}).", hint)


def _is_plain(piece: str) -> bool:
    """Whether a path component is a usable name on every system and stays in its folder."""
    return piece not in ("", ".", "..") and not re.search(r'[\\:*?"<>|\0]', piece)


def _size(count: int) -> str:
    """Bytes for people: "2.1 GB"."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"

"""The transfer: bytes appended to a part, taken up again where they were cut, and hashed on the way."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from shared.app.hub.look_up import READ_SECONDS, Stated
from shared.app.hub.progress import DownloadCancelled, Meter, ShouldStop, size_words
from shared.quant.errors import RunError

if TYPE_CHECKING:
    import httpx2

TRIES_WITHOUT_DATA = 5  # give up after so many tries in a row that brought nothing
RETRY_WAIT_SECONDS = 1.0
RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})


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


def receive_all(stated: Stated, path: Path, meter: Meter, stop: ShouldStop) -> str:
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
            f"Free {size_words(stated.size)}, or keep the file on another disk and name its folder with --ckpts.",
        ) from error


def _repeat_until_whole(stated: Stated, part: _Part, meter: Meter, stop: ShouldStop) -> None:
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


def _receive(stated: Stated, part: _Part, meter: Meter, stop: ShouldStop) -> None:
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


def _stop_if_asked(stop: ShouldStop, meter: Meter, part: _Part) -> None:
    if stop():
        raise DownloadCancelled(
            f"Download of {meter.name} cancelled.",
            f"{size_words(part.size)} are kept; the next download goes on from there.",
        )


def _wait(seconds: float, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        check()
        time.sleep(min(left, 0.1))

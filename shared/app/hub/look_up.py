"""What the Hub states of a file, asked for no longer than a person would wait."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from shared.app.hub.address import HubFile
from shared.app.hub.progress import DownloadCancelled, ShouldStop
from shared.quant.errors import RunError

LOOK_UP_SECONDS = 15.0  # one look-up, name resolution included: it may try eight addresses in turn
READ_SECONDS = 10.0  # a transfer that stands still for so long is taken up again
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Stated:
    """What the Hub says about a file: the address of this very version, its hash and its size in bytes."""

    url: str
    etag: str
    size: int

    @property
    def is_sha256(self) -> bool:
        """Large files carry their SHA-256 (64 digits); small ones, kept in git itself, git's hash (40)."""
        return len(self.etag) == 64


def look_up(file: HubFile, endpoint: str, stop: ShouldStop) -> Stated:
    """Ask the Hub. Raises RunError for an answer without size and hash, and whatever the network raises."""
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
    return Stated(pinned.url(endpoint), str(found.etag), found.size)


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

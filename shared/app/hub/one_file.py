"""One file of the Hub brought here: looked up, received, verified, and only then given its name."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from shared.app.hub.address import HUB, HubFile, by_hand
from shared.app.hub.explain import explained
from shared.app.hub.look_up import Stated, look_up
from shared.app.hub.progress import Meter, OnProgress, ShouldStop, size_words
from shared.app.hub.transfer import receive_all
from shared.quant.errors import RunError

DISK_MARGIN = 64 * 2**20  # bytes left free: a completely full disk stops other programs


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
    with explained(file, endpoint, target):
        stated = look_up(file, endpoint, stop)
        part = target.with_name(f"{target.name}.{stated.etag[:12]}.part")
        for stale in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
            if stale != part:  # bytes of another version of the file: nothing can continue them
                stale.unlink()
        _check_disk(file, stated, part)
        target.parent.mkdir(parents=True, exist_ok=True)
        sha256 = receive_all(stated, part, Meter(file.name, stated.size, on_progress), stop)
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


def _check_disk(file: HubFile, stated: Stated, part: Path) -> None:
    missing = stated.size - (part.stat().st_size if part.exists() else 0)
    folder = next(parent for parent in part.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < missing + DISK_MARGIN:
        raise RunError(
            f"{file.name} needs {size_words(missing)} more, and the disk of {part.parent} has {size_words(free)} free.",
            "Free some space, or keep the file on another disk and name its folder with --ckpts.",
        )


def _verify(file: HubFile, stated: Stated, part: Path, sha256: str, *, endpoint: str, target: Path) -> None:
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

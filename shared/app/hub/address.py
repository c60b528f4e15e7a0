"""A file's address on the Hub, read and written."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from shared.quant.errors import UserError

HUB = "https://huggingface.co"
HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})


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


def _is_plain(piece: str) -> bool:
    """Whether a path component is a usable name on every system and stays in its folder."""
    return piece not in ("", ".", "..") and not re.search(r'[\\:*?"<>|\0]', piece)


def by_hand(url: str, target: Path) -> str:
    """The sentence that every failed download ends with."""
    return (
        f"By hand: download {url} and save it as {target}. "
        "A folder that already holds the file can be named with --ckpts."
    )

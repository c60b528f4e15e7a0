"""Files put into a file store's folders, and the store with a Hub behind it."""

from __future__ import annotations

from pathlib import Path

from shared.app.download import FileStore
from tests.support.hub_server import HubServer

REPO = "owner/Z-Image"
HUB = f"https://huggingface.co/{REPO}/resolve/main"
WEIGHTS = bytes(range(256)) * 4_000
OTHER = "else/Z-Image-NVFP4"
OTHER_HUB = f"https://huggingface.co/{OTHER}/resolve/main"
OTHER_WEIGHTS = WEIGHTS[::-1]


def put(path: Path, content: bytes = b"weights") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def online(store: FileStore, hub: HubServer) -> FileStore:
    return FileStore(store.program_folder, store.roots, store.hub_cache, endpoint=hub.url)

"""A file store in empty folders, and a Hub on the loopback address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.app.download import FileStore
from tests.support.hub_server import HubServer, StoredFile, serve
from tests.support.stores import REPO, WEIGHTS


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """A program folder, its ckpts, a ComfyUI models folder and a Hub cache; no server behind the endpoint."""
    for name in ("program/ckpts", "ComfyUI/models", "cache"):
        (tmp_path / name).mkdir(parents=True)
    roots = [tmp_path / "program/ckpts", tmp_path / "ComfyUI/models"]
    return FileStore(tmp_path / "program", roots, tmp_path / "cache", endpoint="http://127.0.0.1:1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("shared.app.hub.transfer.RETRY_WAIT_SECONDS", 0.0)
    with serve(HubServer({REPO: {"w.safetensors": StoredFile(WEIGHTS)}})) as server:
        yield server

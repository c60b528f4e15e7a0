"""Origins and hashes are remembered by file, and a spoiled list costs nothing but time."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from shared.app.download import FileStore
from shared.app.download.remembered import Remembered
from tests.support.hub_server import HubServer
from tests.support.stores import HUB, OTHER_HUB, WEIGHTS, online, put


def test_a_replaced_download_has_no_known_origin(store: FileStore, hub: HubServer) -> None:
    files = online(store, hub)
    here = files.ensure(f"{HUB}/w.safetensors")

    here.write_bytes(b"something else")

    assert files.locate(f"{OTHER_HUB}/w.safetensors").path == here
    assert files.locate(f"{HUB}/w.safetensors").note


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', "{"])
def test_a_spoiled_list_of_origins_leaves_files_found_by_name(store: FileStore, hub: HubServer, content: str) -> None:
    files = online(store, hub)
    here = files.ensure(f"{HUB}/w.safetensors")

    (store.program_folder / ".cache" / "origins.json").write_text(content)

    assert files.find(f"{OTHER_HUB}/w.safetensors") == here


def test_what_two_programs_remember_at_once_is_all_kept(tmp_path: Path) -> None:
    files = [put(tmp_path / f"{number}.safetensors") for number in range(20)]

    def remember(mine: list[Path]) -> None:
        memory = Remembered(tmp_path / "known.json")
        for file in mine:
            memory.put(file, file.name)

    threads = [threading.Thread(target=remember, args=(files[i::2],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    memory = Remembered(tmp_path / "known.json")
    assert [memory.get(file) for file in files] == [file.name for file in files]


def test_a_file_is_hashed_once(store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "w.safetensors", WEIGHTS)
    first = store.sha256(file)
    monkeypatch.setattr(hashlib, "file_digest", None)  # a second reading would fail

    again = FileStore(store.program_folder, store.roots).sha256(file)

    assert first == again == hashlib.sha256(WEIGHTS).hexdigest()


def test_a_changed_file_is_hashed_again(store: FileStore, tmp_path: Path) -> None:
    file = put(tmp_path / "w.safetensors", b"old")
    store.sha256(file)
    put(file, b"new")
    os.utime(file, ns=(1, 1))

    assert store.sha256(file) == hashlib.sha256(b"new").hexdigest()


def test_a_download_is_not_read_again_for_its_hash(
    store: FileStore, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = online(store, hub).ensure(f"{HUB}/w.safetensors")
    monkeypatch.setattr(hashlib, "file_digest", None)

    assert online(store, hub).sha256(path) == hashlib.sha256(WEIGHTS).hexdigest()


@pytest.mark.parametrize("content", ["{broken", "[]", json.dumps({"w": 3})])
def test_a_spoiled_hash_list_costs_only_time(store: FileStore, tmp_path: Path, content: str) -> None:
    put(store.program_folder / ".cache/sha256.json", content.encode())
    file = put(tmp_path / "w.safetensors", WEIGHTS)

    assert store.sha256(file) == hashlib.sha256(WEIGHTS).hexdigest()

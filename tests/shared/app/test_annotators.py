"""Preprocessors' models are found on this machine, else downloaded, and never used unverified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import shared.preprocess
from shared.app import annotators
from shared.app.annotators import annotator_of, fetch, missing_megabytes
from shared.app.download import FileStore
from shared.app.edit_settings import EditSettings
from shared.preprocess import ModelFile
from shared.quant.errors import CheckpointError, RunError
from tests.support.hub_server import HubServer, StoredFile, serve
from tests.support.tiny_annotators import write_hed

REPO = "owner/annotators"
HED = EditSettings(image_guide="photo.jpg", control_preprocessor="hed")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with a tiny HED network, which is the one that the preprocessor wants."""
    content = write_hed(tmp_path / "made" / "hed.onnx").read_bytes()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("shared.app.hub.transfer.RETRY_WAIT_SECONDS", 0.0)
    with serve(HubServer({REPO: {"hed.onnx": StoredFile(content)}})) as server:
        wanted = ModelFile(f"{server.url}/{REPO}/resolve/main/hed.onnx", 7, hashlib.sha256(content).hexdigest())
        for module in (annotators, shared.preprocess):
            monkeypatch.setattr(module, "FILES", {"hed": (wanted,)})
        yield server


@pytest.fixture
def store(tmp_path: Path, hub: HubServer) -> FileStore:
    return FileStore(tmp_path, [tmp_path / "ckpts"], endpoint=hub.url)


def white_square() -> np.ndarray:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, 16:48] = 255
    return picture


def test_a_model_is_downloaded_once_and_then_works(store: FileStore, hub: HubServer) -> None:
    before = missing_megabytes(store, HED)
    heard: list[str] = []

    edges = fetch(store, HED, on_progress=lambda progress: heard.append(progress.file))(white_square())
    fetch(store, HED)

    assert np.array_equal(edges, white_square())  # the tiny network answers with brightness
    assert [request.path for request in hub.downloads] == [f"/{REPO}/resolve/{'c' * 40}/hed.onnx"]
    assert (store.roots[0] / "annotators" / "hed" / "hed.onnx").is_file()
    assert "hed.onnx" in heard
    assert (before, missing_megabytes(store, HED)) == (7, 0)


def test_a_model_in_any_models_folder_is_found(store: FileStore, hub: HubServer, tmp_path: Path) -> None:
    there = store.roots[0] / "preprocessors" / "hed.onnx"
    there.parent.mkdir(parents=True)
    there.write_bytes((tmp_path / "made" / "hed.onnx").read_bytes())

    assert fetch(store, HED).files == (there,)
    assert hub.downloads == []


def test_another_file_of_the_same_name_is_refused(store: FileStore, tmp_path: Path) -> None:
    other = write_hed(store.roots[0] / "hed.onnx", size=32)

    with pytest.raises(CheckpointError, match=r"hed\.onnx is not the file.*Delete or rename it"):
        fetch(store, HED)

    assert other.is_file()


def test_without_a_network_the_address_is_told(store: FileStore, hub: HubServer) -> None:
    hub.failing = 100

    with pytest.raises(RunError, match=r"hed\.onnx.*By hand: download"):
        fetch(store, HED)


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (HED, "hed"),
        (EditSettings(control_preprocessor="hed"), ""),  # there is no control picture
        (EditSettings(image_start="a.png", tile_scale=2, control_preprocessor="hed"), "hed"),  # each tile is one
        (EditSettings(image_guide="photo.jpg", control_preprocessor="canny"), ""),
    ],
)
def test_a_model_is_wanted_only_where_it_is_used(hub: HubServer, edit: EditSettings, name: str) -> None:
    assert annotator_of(edit) == name

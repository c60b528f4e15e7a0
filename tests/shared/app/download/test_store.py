"""What is missing is downloaded into the first root, once, or it is told what to do by hand."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from filelock import FileLock

from shared.app.download import DownloadCancelled, DownloadProgress, FileStore, Located
from shared.quant.errors import RunError, UserError
from tests.support.hub_server import HubServer, StoredFile
from tests.support.stores import HUB, OTHER, OTHER_HUB, OTHER_WEIGHTS, REPO, WEIGHTS, online, put


def test_a_missing_file_is_downloaded_into_the_first_root(store: FileStore, hub: HubServer) -> None:
    path = online(store, hub).ensure(f"{HUB}/w.safetensors")

    assert path == store.roots[0] / "w.safetensors"
    assert path.read_bytes() == WEIGHTS


def test_a_downloaded_file_is_not_asked_for_again(store: FileStore, hub: HubServer) -> None:
    first = online(store, hub).ensure(f"{HUB}/w.safetensors")
    asked = len(hub.requests)

    assert online(store, hub).ensure(f"{HUB}/w.safetensors") == first
    assert len(hub.requests) == asked


def test_a_file_that_is_already_here_needs_no_network(store: FileStore, tmp_path: Path) -> None:
    here = put(tmp_path / "ComfyUI/models/diffusion_models/w.safetensors")

    assert store.ensure(f"{HUB}/w.safetensors") == here


@pytest.mark.parametrize(
    ("path", "subfolder", "place"),
    [
        ("a/w.safetensors", "", "w.safetensors"),
        ("a/w.safetensors", "Qwen3", "Qwen3/w.safetensors"),
        ("vae/config.json", "", "Z-Image/vae/config.json"),
        ("vae/config.json", "vae", "vae/config.json"),
    ],
)
def test_downloads_go_where_they_are_found_again(
    store: FileStore, hub: HubServer, path: str, subfolder: str, place: str
) -> None:
    hub.repos[REPO][path] = StoredFile(WEIGHTS)
    files = online(store, hub)

    assert files.ensure(f"{HUB}/{path}", subfolder=subfolder) == store.roots[0] / place
    assert files.target(f"{HUB}/{path}", subfolder=subfolder) == store.roots[0] / place
    assert files.find(f"{HUB}/{path}", subfolder=subfolder) == store.roots[0] / place


def test_two_repositories_may_share_a_name(store: FileStore, hub: HubServer) -> None:
    hub.repos[OTHER] = {"w.safetensors": StoredFile(OTHER_WEIGHTS)}
    files = online(store, hub)

    first = files.ensure(f"{HUB}/w.safetensors")
    assert files.locate(f"{HUB}/w.safetensors") == Located(first)
    missing = files.locate(f"{OTHER_HUB}/w.safetensors")
    assert missing.path is None
    assert missing.note == f"{first} has the same name, but is from {REPO}"

    second = files.ensure(f"{OTHER_HUB}/w.safetensors")

    assert (first.read_bytes(), second.read_bytes()) == (WEIGHTS, OTHER_WEIGHTS)
    assert second == store.roots[0] / "Z-Image-NVFP4" / "w.safetensors"
    again = online(store, hub)  # another run
    assert again.find(f"{HUB}/w.safetensors") == first
    assert again.find(f"{OTHER_HUB}/w.safetensors") == second


def test_hf_endpoint_names_the_server(store: FileStore, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")

    path = FileStore(store.program_folder, store.roots).ensure(f"{HUB}/w.safetensors")

    assert path.read_bytes() == WEIGHTS


def test_progress_and_cancel_reach_the_download(store: FileStore, hub: HubServer) -> None:
    seen: list[DownloadProgress] = []

    with pytest.raises(DownloadCancelled):
        online(store, hub).ensure(f"{HUB}/w.safetensors", on_progress=seen.append, should_stop=lambda: bool(seen))

    assert seen[0] == DownloadProgress("w.safetensors", 0, len(WEIGHTS), 0.0)
    assert store.find(f"{HUB}/w.safetensors") is None


def test_two_at_once_download_a_file_once(store: FileStore, hub: HubServer) -> None:
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(online(store, hub).ensure(f"{HUB}/w.safetensors")))
        for _ in range(2)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert paths == [store.roots[0] / "w.safetensors"] * 2
    assert len(hub.downloads) == 1


def test_whoever_waits_for_another_programs_download_sees_how_far_it_is(store: FileStore, hub: HubServer) -> None:
    locks = store.roots[0] / ".cache" / "locks"
    locks.mkdir(parents=True)
    put(store.roots[0] / "w.safetensors.0123456789ab.part", b"so far")
    seen: list[DownloadProgress] = []

    with FileLock(locks / "w.safetensors.lock"), pytest.raises(DownloadCancelled, match="waiting for another"):
        online(store, hub).ensure(f"{HUB}/w.safetensors", on_progress=seen.append, should_stop=lambda: bool(seen))

    assert seen == [DownloadProgress("w.safetensors", len(b"so far"), None, 0.0)]


def test_a_root_that_cannot_be_written_is_named(store: FileStore, hub: HubServer) -> None:
    put(store.roots[0] / ".cache")

    with pytest.raises(RunError, match=r"w\.safetensors cannot be saved below") as raised:
        online(store, hub).ensure(f"{HUB}/w.safetensors")

    assert str(store.roots[0]) in raised.value.message and "--ckpts" in raised.value.hint


def test_without_a_network_the_error_says_where_to_put_the_file(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    with pytest.raises(RunError) as raised:
        store.ensure(f"{HUB}/w.safetensors")

    assert "w.safetensors" in raised.value.message and "127.0.0.1:1" in raised.value.message
    assert str(store.roots[0] / "w.safetensors") in raised.value.hint
    assert "--ckpts" in raised.value.hint


def test_an_address_off_the_hub_is_refused_with_the_way_by_hand(store: FileStore) -> None:
    url = "https://civitai.com/files/pretty.safetensors"

    with pytest.raises(UserError, match="no address of a file on the Hugging Face Hub") as raised:
        store.ensure(url)

    assert url in raised.value.hint
    assert str(store.roots[0] / "pretty.safetensors") in raised.value.hint


def test_a_file_by_hand_from_off_the_hub_is_taken(store: FileStore, tmp_path: Path) -> None:
    here = put(tmp_path / "program/ckpts/pretty.safetensors")

    assert store.ensure("https://civitai.com/files/pretty.safetensors?token=1") == here


def test_a_missing_path_says_where_it_was_looked_for(store: FileStore) -> None:
    with pytest.raises(UserError) as raised:
        store.ensure("mine.safetensors")

    assert all(str(root) in raised.value.message for root in store.roots)


def test_a_missing_file_of_the_program_is_named_in_full(store: FileStore) -> None:
    with pytest.raises(UserError, match="belongs to the program") as raised:
        store.ensure("file:models/demo/transformer.safetensors")

    assert str(store.program_folder / "models/demo/transformer.safetensors") in raised.value.message


@pytest.mark.parametrize(
    "address",
    ["https://[broken/w.safetensors", f"https://civitai.com/{'w' * 300}.safetensors", f"{'w' * 300}.safetensors",
     "~nobody-of-this-name/w.safetensors"],
)  # fmt: skip
def test_an_address_that_can_be_no_file_is_refused_in_words(store: FileStore, address: str) -> None:
    for root in store.roots:
        root.mkdir(parents=True, exist_ok=True)

    with pytest.raises(UserError):
        store.ensure(address)


@pytest.mark.parametrize("subfolder", ["../up", "/etc", "a/../../b"])
def test_a_subfolder_cannot_leave_the_root(store: FileStore, subfolder: str) -> None:
    with pytest.raises(UserError, match="not a folder below"):
        store.ensure(f"{HUB}/w.safetensors", subfolder=subfolder)

"""Files are found on this machine before anything is downloaded, and downloaded into the first root."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from shared.app.download import DownloadCancelled, DownloadProgress, FileStore, Located, default_hub_cache
from shared.app.download.names import is_generic
from shared.app.download.remembered import Remembered
from shared.quant.errors import RunError, UserError
from tests.support.hub_server import HubServer, StoredFile, serve

PROGRAM = Path(__file__).parents[3]
REPO = "owner/Z-Image"
HUB = f"https://huggingface.co/{REPO}/resolve/main"
WEIGHTS = bytes(range(256)) * 4_000


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


def put(path: Path, content: bytes = b"weights") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize(
    "place",
    [
        "program/ckpts/w.safetensors",
        "ComfyUI/models/w.safetensors",
        "ComfyUI/models/diffusion_models/w.safetensors",
        "ComfyUI/models/diffusion_models/z image/turbo/w.safetensors",
    ],
)
def test_a_file_is_found_in_any_root_and_its_folders(store: FileStore, tmp_path: Path, place: str) -> None:
    expected = put(tmp_path / place)

    assert store.find(f"{HUB}/split/w.safetensors") == expected
    assert store.find("w.safetensors") == expected


def test_the_first_root_wins(store: FileStore, tmp_path: Path) -> None:
    put(tmp_path / "ComfyUI/models/w.safetensors")
    expected = put(tmp_path / "program/ckpts/w.safetensors")

    assert store.find(f"{HUB}/w.safetensors") == expected


def test_of_two_files_of_one_name_the_one_in_the_same_folder_is_taken(store: FileStore, tmp_path: Path) -> None:
    put(tmp_path / "ComfyUI/models/checkpoints/q.safetensors")
    expected = put(tmp_path / "ComfyUI/models/text_encoders/q.safetensors")

    assert store.find(f"{HUB}/split_files/text_encoders/q.safetensors") == expected


def test_a_file_put_there_while_the_program_runs_is_found(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.app.download.listing.LISTING_SECONDS", 0.0)
    assert store.find(f"{HUB}/w.safetensors") is None

    expected = put(tmp_path / "ComfyUI/models/unet/w.safetensors")

    assert store.find(f"{HUB}/w.safetensors") == expected


def test_a_file_is_found_while_another_thread_lists_the_folders_anew(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = put(tmp_path / "ComfyUI/models/unet/w.safetensors")
    assert store.find("w.safetensors") == expected
    found_meanwhile = []
    walk = os.walk

    def walk_with_company(*where: Path, followlinks: bool) -> Iterator[tuple[str, list[str], list[str]]]:
        monkeypatch.setattr("shared.app.download.listing.LISTING_SECONDS", 60.0)
        found_meanwhile.append(store.find("w.safetensors"))
        monkeypatch.setattr("shared.app.download.listing.LISTING_SECONDS", 0.0)
        yield from walk(*where, followlinks=followlinks)

    monkeypatch.setattr(os, "walk", walk_with_company)
    monkeypatch.setattr("shared.app.download.listing.LISTING_SECONDS", 0.0)
    store.find("another.safetensors")

    assert set(found_meanwhile) == {expected}


def test_a_name_that_says_nothing_counts_only_under_its_repository(store: FileStore, tmp_path: Path) -> None:
    url = f"{HUB}/vae/diffusion_pytorch_model.safetensors"
    put(tmp_path / "ComfyUI/models/vae/diffusion_pytorch_model.safetensors")
    put(tmp_path / "program/ckpts/diffusion_pytorch_model.safetensors")
    assert store.find(url) is None

    expected = put(tmp_path / "ComfyUI/models/Z-Image/vae/diffusion_pytorch_model.safetensors")

    assert store.find(url) == expected


@pytest.mark.parametrize(
    ("name", "generic"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00003.safetensors", True),
        ("model.safetensors.index.json", True),
        ("diffusion_pytorch_model.fp16.safetensors", True),
        ("config.json", True),
        ("tokenizer.json", True),
        ("merges.txt", True),
        ("ZImageTurbo_bf16.safetensors", False),
        ("ZImageTurbo_VAE_bf16_config.json", False),
        ("qwen_3_4b.safetensors", False),
        ("model_patch_zimage.safetensors", False),
    ],
)
def test_names_that_say_nothing_are_told_from_names_that_do(name: str, generic: bool) -> None:
    assert is_generic(name) is generic


def test_a_subfolder_is_looked_at_first(store: FileStore, tmp_path: Path) -> None:
    put(tmp_path / "program/ckpts/Other/config.json")
    expected = put(tmp_path / "ComfyUI/models/Qwen3/config.json")

    assert store.find(f"{HUB}/text_encoder/config.json", subfolder="Qwen3") == expected


def test_an_empty_file_and_a_link_into_nowhere_are_not_found(store: FileStore, tmp_path: Path) -> None:
    put(tmp_path / "program/ckpts/w.safetensors", b"")
    (tmp_path / "ComfyUI/models/w.safetensors").symlink_to(tmp_path / "gone")

    assert store.find(f"{HUB}/w.safetensors") is None


def test_a_file_of_the_program_is_found_by_its_file_address(store: FileStore, tmp_path: Path) -> None:
    expected = put(tmp_path / "program/models/demo/transformer.safetensors")

    assert store.find("file:models/demo/transformer.safetensors") == expected
    assert store.find("file:models/demo/none.safetensors") is None


def test_paths_are_found_as_they_are(store: FileStore, tmp_path: Path) -> None:
    absolute = put(tmp_path / "elsewhere/w.safetensors")
    relative = put(tmp_path / "ComfyUI/models/my/w2.safetensors")

    assert store.find(str(absolute)) == absolute
    assert store.find("my/w2.safetensors") == relative
    assert store.find("other/w2.safetensors") is None


def test_a_file_in_the_hub_cache_is_found_by_branch_and_by_commit(store: FileStore, tmp_path: Path) -> None:
    commit, repo = "d" * 40, tmp_path / "cache/models--owner--Z-Image"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    expected = put(repo / "snapshots" / commit / "vae/model.safetensors")

    assert store.find(f"{HUB}/vae/model.safetensors") == expected
    assert store.find(f"{HUB.replace('main', commit)}/vae/model.safetensors") == expected
    assert store.find(f"{HUB.replace('main', 'v2')}/vae/model.safetensors") is None


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HF_HUB_CACHE": "/a/hub"}, "/a/hub"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hub"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX paths")
def test_the_hub_cache_is_where_huggingface_hub_has_it(environ: dict[str, str], expected: str) -> None:
    program = (
        "import huggingface_hub.constants as c; from shared.app.download import default_hub_cache as d; "
        "print(c.HF_HUB_CACHE, d())"
    )

    answer = subprocess.run(
        [sys.executable, "-c", program], env=environ, cwd=PROGRAM, capture_output=True, text=True, check=True
    )

    assert answer.stdout.split() == [expected, expected]


def test_the_environment_names_the_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    assert default_hub_cache() == tmp_path


# ---------------------------------------------------------------------------------------------- downloading


def online(store: FileStore, hub: HubServer) -> FileStore:
    return FileStore(store.program_folder, store.roots, store.hub_cache, endpoint=hub.url)


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


OTHER = "else/Z-Image-NVFP4"
OTHER_HUB = f"https://huggingface.co/{OTHER}/resolve/main"
OTHER_WEIGHTS = WEIGHTS[::-1]


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


def test_a_file_in_a_folder_is_passed_over_when_it_is_known_to_be_another(store: FileStore, hub: HubServer) -> None:
    other = online(store, hub).ensure(f"{HUB}/w.safetensors")
    right = put(store.roots[1] / "diffusion_models" / "w.safetensors")

    assert online(store, hub).find(f"{OTHER_HUB}/w.safetensors") == right != other


def test_a_file_of_unknown_origin_is_taken_by_its_name_and_said_to_be(store: FileStore) -> None:
    here = put(store.roots[0] / "w.safetensors")

    assert store.locate(f"{HUB}/w.safetensors") == Located(
        here, "taken by its name: nothing here says where it is from"
    )


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


# ---------------------------------------------------------------------------------------------- hashes


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

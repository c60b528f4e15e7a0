"""Downloads from a Hub: whole and verified, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.app.hub import DownloadCancelled, DownloadProgress, HubFile, download, parse_hub_url
from shared.app.hub.transfer import TRIES_WITHOUT_DATA
from shared.quant.errors import RunError, UserError
from tests.support.hub_server import COMMIT, HubServer, StoredFile, serve

REPO = "owner/Z-Image"
WEIGHTS = bytes(range(256)) * 12_000  # 3 MB: several network reads, and a cut has a middle
CONFIG = b'{"dim": 3840}\n'
TINY = HubFile(REPO, "main", "sub/weights.safetensors")


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests talk to a loopback server; the suite's offline mode is for everything else."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("shared.app.hub.transfer.RETRY_WAIT_SECONDS", 0.0)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    files = {TINY.path: StoredFile(WEIGHTS), "config.json": StoredFile(CONFIG, in_git=True)}
    with serve(HubServer({REPO: files})) as server:
        yield server


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "ckpts" / "weights.safetensors"


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.glob("*")) if target.parent.exists() else []


def test_a_download_arrives_whole_and_returns_its_sha256(hub: HubServer, target: Path) -> None:
    digest = download(TINY, target, endpoint=hub.url)

    assert target.read_bytes() == WEIGHTS
    assert digest == hashlib.sha256(WEIGHTS).hexdigest()
    assert leftovers(target) == [target.name]


def test_a_small_file_kept_in_git_is_verified_by_its_git_hash(hub: HubServer, tmp_path: Path) -> None:
    target = tmp_path / "config.json"
    config = HubFile(REPO, "main", "config.json")

    download(config, target, endpoint=hub.url)
    assert target.read_bytes() == CONFIG

    target.unlink()
    hub.repos[REPO]["config.json"] = StoredFile(b'{"dim": 9999}\n', true_content=CONFIG, in_git=True)
    with pytest.raises(RunError, match="wrong bytes"):
        download(config, target, endpoint=hub.url)
    assert not target.exists()


def test_bytes_are_fetched_from_the_version_that_was_looked_up(hub: HubServer, target: Path) -> None:
    download(TINY, target, endpoint=hub.url)

    assert [request.path.split("/resolve/")[1].split("/")[0] for request in hub.requests] == ["main", COMMIT]


def test_a_cut_transfer_goes_on_where_it_was_cut(hub: HubServer, target: Path) -> None:
    hub.cuts = [1_000_000, 500_000]

    download(TINY, target, endpoint=hub.url)

    assert target.read_bytes() == WEIGHTS
    assert [request.range for request in hub.downloads] == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_later_run_continues_what_an_earlier_one_received(hub: HubServer, target: Path) -> None:
    with pytest.raises(DownloadCancelled, match="cancelled"):
        download(TINY, target, endpoint=hub.url, should_stop=lambda: part_size(target) > 1_000_000)
    assert not target.exists()
    kept = part_size(target)

    download(TINY, target, endpoint=hub.url)

    assert target.read_bytes() == WEIGHTS
    assert 0 < kept < len(WEIGHTS)
    assert hub.downloads[-1].range == f"bytes={kept}-"
    assert leftovers(target) == [target.name]


def part_size(target: Path) -> int:
    return sum(part.stat().st_size for part in target.parent.glob("*.part"))


def test_a_server_that_ignores_the_range_starts_the_file_again(hub: HubServer, target: Path) -> None:
    hub.cuts, hub.ignores_range = [1_000_000], True

    download(TINY, target, endpoint=hub.url)

    assert target.read_bytes() == WEIGHTS


def test_a_new_version_on_the_hub_does_not_continue_the_old_part(hub: HubServer, target: Path) -> None:
    hub.cuts = [1_000_000] + [0] * 9
    with pytest.raises(RunError):
        download(TINY, target, endpoint=hub.url)
    hub.cuts.clear()
    newer = WEIGHTS[::-1]
    hub.repos[REPO][TINY.path] = StoredFile(newer)

    download(TINY, target, endpoint=hub.url)

    assert target.read_bytes() == newer
    assert leftovers(target) == [target.name]


def test_wrong_bytes_of_the_right_length_are_deleted_and_named(hub: HubServer, target: Path) -> None:
    wrong = b"\xff" + WEIGHTS[1:]
    hub.repos[REPO][TINY.path] = StoredFile(wrong, true_content=WEIGHTS)

    with pytest.raises(RunError) as raised:
        download(TINY, target, endpoint=hub.url)

    assert leftovers(target) == []
    assert hashlib.sha256(wrong).hexdigest() in raised.value.message
    assert hashlib.sha256(WEIGHTS).hexdigest() in raised.value.message
    assert "deleted" in raised.value.message


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(hub: HubServer, target: Path) -> None:
    hub.failing = 2

    download(TINY, target, endpoint=hub.url)

    assert target.read_bytes() == WEIGHTS


def test_a_hub_that_never_recovers_is_given_up_with_a_hint(hub: HubServer, target: Path) -> None:
    hub.failing = 1000

    with pytest.raises(RunError, match="503") as raised:
        download(TINY, target, endpoint=hub.url)

    assert str(target) in raised.value.hint
    assert len(hub.downloads) == TRIES_WITHOUT_DATA


def test_no_server_is_an_error_within_seconds_that_says_what_to_do(target: Path) -> None:
    with socket.socket() as listener:  # bound, not listening: connections are refused
        listener.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        start = time.monotonic()

        with pytest.raises(RunError) as raised:
            download(TINY, target, endpoint=endpoint)

    assert time.monotonic() - start < 3
    assert TINY.name in raised.value.message and "cannot be reached" in raised.value.message
    assert f"{endpoint}/{REPO}/resolve/main/{TINY.path}" in raised.value.hint
    assert str(target) in raised.value.hint
    assert leftovers(target) == []


def test_a_hub_that_never_answers_is_given_up(hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.silent = True
    monkeypatch.setattr("shared.app.hub.look_up.LOOK_UP_SECONDS", 0.2)

    with pytest.raises(RunError, match="no answer within"):
        download(TINY, target, endpoint=hub.url)


def test_cancel_is_heard_while_a_hub_does_not_answer(hub: HubServer, target: Path) -> None:
    hub.silent = True
    start = time.monotonic()

    with pytest.raises(DownloadCancelled):
        download(TINY, target, endpoint=hub.url, should_stop=lambda: time.monotonic() - start > 0.1)

    assert time.monotonic() - start < 3


def test_cancel_is_heard_while_an_earlier_runs_bytes_are_read(
    hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = target.with_name(f"{target.name}.{hashlib.sha256(WEIGHTS).hexdigest()[:12]}.part")
    part.parent.mkdir()
    part.write_bytes(WEIGHTS[:2_000_000])
    looked_up: list[bool] = []
    monkeypatch.setattr("shared.app.hub.one_file._check_disk", lambda *_: looked_up.append(True))

    with pytest.raises(DownloadCancelled) as raised:
        download(TINY, target, endpoint=hub.url, should_stop=lambda: bool(looked_up))

    assert hub.downloads == []
    assert part.stat().st_size == 2_000_000
    assert raised.value.hint.startswith("2.0 MB are kept")


def test_offline_mode_is_named(hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(RunError, match="HF_HUB_OFFLINE"):
        download(TINY, target, endpoint=hub.url)

    assert hub.requests == []


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (HubFile(REPO, "main", "none.safetensors"), "has no file none.safetensors"),
        (HubFile(REPO, "v9", TINY.path), 'no revision "v9"'),
        (HubFile("owner/none", "main", TINY.path), "owner/none is not there, or only some accounts"),
    ],
)
def test_what_the_hub_does_not_have_is_the_users_to_correct(
    hub: HubServer, target: Path, file: HubFile, words: str
) -> None:
    with pytest.raises(UserError) as raised:
        download(file, target, endpoint=hub.url)

    assert words in raised.value.message
    assert not isinstance(raised.value, RunError)
    assert str(target) in raised.value.hint


def test_a_gated_repository_says_where_to_accept_its_terms(hub: HubServer, target: Path) -> None:
    hub.gated.add(REPO)

    with pytest.raises(UserError, match="gated") as raised:
        download(TINY, target, endpoint=hub.url)

    assert f"{hub.url}/{REPO}" in raised.value.hint and "hf auth login" in raised.value.hint


def test_a_forbidden_repository_asks_for_a_login(hub: HubServer, target: Path) -> None:
    hub.forbidden.add(REPO)

    with pytest.raises(UserError, match="403") as raised:
        download(TINY, target, endpoint=hub.url)

    assert "hf auth login" in raised.value.hint


def test_a_login_goes_to_the_hub_but_not_to_the_storage_host(
    hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    with serve(HubServer(hub.repos)) as storage:
        hub.storage = storage.url

        download(TINY, target, endpoint=hub.url)

    assert target.read_bytes() == WEIGHTS
    assert {request.authorization for request in hub.requests} == {"Bearer hf_secret"}
    assert [request.authorization for request in storage.requests] == [None]


def test_too_little_disk_is_said_before_anything_is_fetched(
    hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(target.parent.parent)._replace(free=len(WEIGHTS))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with pytest.raises(RunError, match=r"needs 3\.1 MB more, .* has 3\.1 MB free"):
        download(TINY, target, endpoint=hub.url)

    assert hub.downloads == []


def test_a_disk_that_fills_up_leaves_no_part_behind(
    hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shared.app.hub.transfer._Part.write", full)

    with pytest.raises(RunError, match="became full"):
        download(TINY, target, endpoint=hub.url)

    assert leftovers(target) == []


def test_progress_runs_from_nothing_to_the_whole_file(
    hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.app.hub.progress.REPORT_SECONDS", 0.0)
    seen: list[DownloadProgress] = []

    download(TINY, target, endpoint=hub.url, on_progress=seen.append)

    done = [progress.done for progress in seen]
    assert done[0] == 0 and done[-1] == len(WEIGHTS) and done == sorted(done)
    assert {(progress.file, progress.total) for progress in seen} == {(TINY.name, len(WEIGHTS))}
    assert seen[-1].bytes_per_second > 0


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://huggingface.co/a/b/resolve/main/c/d.json", HubFile("a/b", "main", "c/d.json")),
        ("https://huggingface.co/a/b/blob/v1/d.json?download=true", HubFile("a/b", "v1", "d.json")),
        ("https://hf.co/a/b/resolve/main/with%20space.json", HubFile("a/b", "main", "with space.json")),
        ("http://mirror.local/hub/a/b/resolve/main/d.json", HubFile("a/b", "main", "d.json")),
        ("https://huggingface.co/a/b", None),
        ("https://huggingface.co/datasets/a/b/resolve/main/d.json", None),
        ("https://civitai.com/api/download/models/12", None),
        ("models/local.safetensors", None),
        ("https://[broken/d.json", None),
    ],
)
def test_hub_addresses_are_recognised(url: str, expected: HubFile | None) -> None:
    assert parse_hub_url(url, "http://mirror.local/hub") == expected


@pytest.mark.parametrize("path", ["../x", "a/../../x", "a//x", "a%2F..%2Fx", "C:%5Cx"])
def test_a_path_that_leaves_its_folder_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="not a plain file path"):
        parse_hub_url(f"https://huggingface.co/a/b/resolve/main/{path}")


def test_an_address_is_rebuilt_as_it_was_read() -> None:
    url = "https://huggingface.co/a/b/resolve/main/c/with%20space.json"

    assert HubFile("a/b", "main", "c/with space.json").url() == url

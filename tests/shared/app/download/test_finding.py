"""Files are found on this machine: in any root, by name, by path, in the Hub's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.app.download import FileStore, Located, default_hub_cache
from shared.app.download.names import is_generic
from tests.support.hub_server import HubServer
from tests.support.stores import HUB, OTHER_HUB, online, put

PROGRAM = Path(__file__).parents[4]


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


def test_a_file_in_a_folder_is_passed_over_when_it_is_known_to_be_another(store: FileStore, hub: HubServer) -> None:
    other = online(store, hub).ensure(f"{HUB}/w.safetensors")
    right = put(store.roots[1] / "diffusion_models" / "w.safetensors")

    assert online(store, hub).find(f"{OTHER_HUB}/w.safetensors") == right != other


def test_a_file_of_unknown_origin_is_taken_by_its_name_and_said_to_be(store: FileStore) -> None:
    here = put(store.roots[0] / "w.safetensors")

    assert store.locate(f"{HUB}/w.safetensors") == Located(
        here, "taken by its name: nothing here says where it is from"
    )

"""Files and folders found below the checkpoint roots, as a Wan2GP handler asks for them."""

import os

import pytest

from shared.utils import files_locator


@pytest.fixture
def roots(tmp_path):
    """Two checkpoint roots; the defaults come back afterwards."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    files_locator.set_checkpoints_paths([str(first), " ", str(second)])
    yield first, second
    files_locator.set_checkpoints_paths([])


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return str(path)


def test_roots_are_searched_in_order(roots):
    first, second = roots
    only_second = touch(second / "a.safetensors")
    assert files_locator.locate_file("a.safetensors") == only_second

    in_first = touch(first / "a.safetensors")
    assert files_locator.locate_file("a.safetensors") == in_first


def test_a_url_is_found_by_its_file_name_and_folder(roots):
    plain, nested = touch(roots[1] / "a.safetensors"), touch(roots[1] / "sub" / "b.safetensors")

    assert files_locator.locate_file("https://host/x/resolve/main/a.safetensors?download=true") == plain
    assert files_locator.locate_file("https://host/x/b.safetensors|sub") == nested


def test_extra_paths_are_folders_or_folders_below_a_root(roots, tmp_path):
    aside, below = touch(tmp_path / "aside" / "a.json"), touch(roots[1] / "Qwen3" / "b.json")

    assert files_locator.locate_file("a.json", extra_paths=[str(tmp_path / "aside")]) == aside
    assert files_locator.locate_file("b.json", extra_paths="Qwen3") == below


def test_a_missing_file_is_told_with_every_place_searched(roots):
    with pytest.raises(FileNotFoundError) as error:
        files_locator.locate_file("none.safetensors")

    for root in roots:
        assert str(root / "none.safetensors") in str(error.value)


def test_a_missing_file_may_be_answered_with_none_or_with_its_place(roots):
    assert files_locator.locate_file("none.json", error_if_none=False) is None
    assert files_locator.locate_file("none.json", create_path_if_none=True) == str(roots[0] / "none.json")


def test_folders_are_found_likewise(roots):
    (roots[1] / "Qwen3").mkdir()

    assert files_locator.locate_folder("Qwen3") == str(roots[1] / "Qwen3")
    assert files_locator.locate_folder("none", error_if_none=False) is None
    with pytest.raises(FileNotFoundError, match="The folder none was not found"):
        files_locator.locate_folder("none")


def test_absolute_paths_are_taken_as_they_are(roots, tmp_path):
    path = touch(tmp_path / "a.safetensors")

    assert files_locator.locate_file(path) == path
    assert files_locator.locate_folder(str(tmp_path)) == str(tmp_path)
    assert files_locator.locate_file(str(tmp_path / "b"), error_if_none=False) is None


def test_file_addresses_lie_below_the_programs_folder(roots):
    found = files_locator.locate_file("file:shared/utils/files_locator.py")

    assert os.path.samefile(found, files_locator.__file__)
    assert files_locator.locate_folder("file:shared/utils") == os.path.dirname(found)


def test_downloads_go_below_the_first_root(roots):
    first = str(roots[0])
    location = files_locator.get_download_location

    assert location() == first
    assert location("a.json") == os.path.join(first, "a.json")
    assert location("https://host/a.json|maps") == os.path.join(first, "maps", "a.json")
    assert location("a.json", force_path=["Qwen3"]) == os.path.join(first, "Qwen3", "a.json")
    assert location(None, "Qwen3") == os.path.join(first, "Qwen3")
    assert location("https://host/a.sft|%lora_dir", lora_dir="/loras") == os.path.join(
        os.path.abspath("/loras"), "a.sft"
    )


@pytest.mark.parametrize("folder", ["../outside", "/outside", "a/../../b", "..\\outside"])
def test_a_url_cannot_lead_out_of_the_root(roots, folder):
    with pytest.raises(ValueError, match="must lie below a checkpoint root"):
        files_locator.get_download_location(f"https://host/a.json|{folder}")


def test_without_roots_the_defaults_return(roots):
    files_locator.set_checkpoints_paths(["", "  "])

    assert files_locator.get_download_location("a.json") == os.path.join("ckpts", "a.json")

"""What --output means, and that a place is tried before work begins."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.app.output import resolve_output, slug_of
from shared.quant.errors import UserError

MORNING = datetime(2026, 11, 21, 9, 5, 7)


def settings(**values: Any) -> Any:
    return SimpleNamespace(**{"seed": 42, "prompt": "A fox!"} | values)


def names(output: str, folder: Path, images: int) -> list[str]:
    place = resolve_output(f"{folder}/{output}", folder / "default", images)
    return [place.path_for(settings(seed=42 + i), i, MORNING).relative_to(folder).as_posix() for i in range(images)]


@pytest.mark.parametrize(
    ("output", "images", "expected"),
    [
        ("fox.png", 1, ["fox.png"]),
        ("deep/fox.webp", 1, ["deep/fox.webp"]),
        ("fox.jpg", 2, ["fox_1.jpg", "fox_2.jpg"]),
        ("fox_{seed}.png", 2, ["fox_42.png", "fox_43.png"]),
        ("{index}-fox.png", 2, ["1-fox.png", "2-fox.png"]),
        ("folder", 1, ["folder/2026-11-21-09h05m07s_seed42_a-fox.png"]),
        ("v1.5/", 1, ["v1.5/2026-11-21-09h05m07s_seed42_a-fox.png"]),
    ],
)
def test_a_name_with_a_pictures_suffix_is_a_file_and_the_rest_are_folders(
    tmp_path: Path, output: str, images: int, expected: list[str]
) -> None:
    assert names(output, tmp_path, images) == expected


def test_a_folder_that_exists_is_one_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "pictures.png").mkdir()

    assert names("pictures.png", tmp_path, 1) == ["pictures.png/2026-11-21-09h05m07s_seed42_a-fox.png"]


def test_nothing_named_means_the_default_folder(tmp_path: Path) -> None:
    assert resolve_output(None, tmp_path / "default", 1).folder == tmp_path / "default"


def test_a_format_that_cannot_carry_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.bmp") as caught:
        resolve_output("fox.bmp", tmp_path, 1)

    assert ".png" in caught.value.hint


def test_names_made_up_here_never_replace_a_picture(tmp_path: Path) -> None:
    place = resolve_output(None, tmp_path, 1)
    place.path_for(settings(), 0, MORNING).touch()

    assert place.path_for(settings(), 0, MORNING).name == "2026-11-21-09h05m07s_seed42_a-fox_2.png"


def test_preparing_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    resolve_output(tmp_path / "a" / "b" / "fox.png", tmp_path, 1).prepare()

    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match="cannot be written"):
        resolve_output(tmp_path / "file" / "fox.png", tmp_path, 1).prepare()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_read_only_file_or_folder_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "fox.png").touch(mode=0o400)
    (tmp_path / "folder").mkdir(mode=0o500)

    for output in ("fox.png", "folder/"):
        with pytest.raises(UserError, match=r"read-only|cannot be written"):
            resolve_output(f"{tmp_path}/{output}", tmp_path, 1).prepare()


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("A red circle, on BLUE.", "a-red-circle-on-blue"),
        ("../../etc/passwd", "etc-passwd"),
        ("Füchse 狐", "füchse-狐"),
        ("a_b", "a-b"),
        ("!!!", ""),
        ("x" * 200, "x" * 50),
    ],
)
def test_a_prompt_becomes_part_of_a_file_name(prompt: str, slug: str) -> None:
    assert slug_of(prompt) == slug


def test_a_prompt_without_words_leaves_no_trace_in_the_name(tmp_path: Path) -> None:
    name = resolve_output(None, tmp_path, 1).path_for(settings(prompt="?!"), 0, MORNING).name

    assert name == "2026-11-21-09h05m07s_seed42.png"

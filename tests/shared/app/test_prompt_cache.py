"""Encoded prompts on the disk: found again, bounded, and never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from shared.app.prompt_cache import EncoderPrompts, PromptCache

FEATURES = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
MUCH = 10**6


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "prompts", MUCH)


def used_at(cache: PromptCache, key: str, second: int) -> None:
    os.utime(cache.folder / f"{key}.safetensors", (second, second))


def names(cache: PromptCache) -> set[str]:
    return {path.stem for path in cache.folder.iterdir()}


def test_what_was_kept_comes_back_bit_for_bit(cache: PromptCache) -> None:
    cache.save("fox", FEATURES)

    found = PromptCache(cache.folder, MUCH).load("fox")  # as in the next run

    assert found is not None
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, FEATURES)


def test_an_unknown_prompt_is_a_miss(cache: PromptCache) -> None:
    assert cache.load("fox") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"\xff" * 64,
        lambda data: data.replace(b'"features"', b'"featurez"'),
        lambda data: data.replace(b'"BF16"', b'"XX16"'),
        lambda data: data[:-2] + b"\xff\x7f",  # the last number is NaN
    ],
)
def test_a_damaged_file_is_a_miss_and_removed(cache: PromptCache, damage: object) -> None:
    cache.save("fox", FEATURES)
    path = cache.folder / "fox.safetensors"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]

    assert cache.load("fox") is None
    assert not path.exists()


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, MUCH)
    for second, key in enumerate(("old", "older but used", "new")):
        cache.save(key, FEATURES)
        used_at(cache, key, second)
    cache.load("older but used")
    size = next(tmp_path.iterdir()).stat().st_size

    PromptCache(tmp_path, 3 * size).save("newest", FEATURES)

    assert names(cache) == {"older but used", "new", "newest"}


def test_the_folder_never_holds_more_than_its_limit(tmp_path: Path) -> None:
    size = len(_written(tmp_path / "a"))
    cache = PromptCache(tmp_path / "b", 2 * size + 1)

    for i in range(5):
        cache.save(str(i), FEATURES)

    assert sum(path.stat().st_size for path in cache.folder.iterdir()) == 2 * size


def test_a_prompt_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, 8)

    cache.save("fox", FEATURES)

    assert cache.load("fox") is None


def test_a_folder_that_cannot_be_made_is_told_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = PromptCache(tmp_path / "file" / "prompts", MUCH)

    cache.save("fox", FEATURES)

    assert "was not kept" in caplog.text


def test_encoders_do_not_see_each_others_prompts(cache: PromptCache) -> None:
    EncoderPrompts(cache, lambda: "one").save("fox", FEATURES)

    assert EncoderPrompts(cache, lambda: "another").load("fox") is None
    assert EncoderPrompts(cache, lambda: "one").load("fox") is not None


def test_prompts_wait_until_their_encoder_is_known(cache: PromptCache) -> None:
    identity: list[str] = []
    prompts = EncoderPrompts(cache, lambda: identity[0] if identity else None)
    prompts.save("fox", FEATURES)
    before = cache.folder.is_dir()

    identity.append("one")
    prompts.flush()

    assert not before
    assert prompts.load("fox") is not None


def _written(folder: Path) -> bytes:
    cache = PromptCache(folder, MUCH)
    cache.save("fox", FEATURES)
    return (folder / "fox.safetensors").read_bytes()

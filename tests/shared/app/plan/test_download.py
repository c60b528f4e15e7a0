"""What is to be downloaded is told before it is: how much, what is not counted, and whether the disk holds it."""

from __future__ import annotations

import os
import shutil

import pytest

from shared.app.context import AppContext
from tests.support.fake_plans import REMOTE, plan


def test_a_file_that_is_elsewhere_is_to_be_downloaded(ctx: AppContext) -> None:
    made = plan(ctx, "remote")

    assert [file.url for file in made.to_download] == [REMOTE]
    assert made.memory is None  # a file's size counts, and the preset does not say it
    assert made.download is not None and made.download.words == "1 file of unknown size"


def test_a_download_says_what_it_does_not_count(sized: AppContext) -> None:
    made = plan(sized, "remote", activated_loras=["https://example.org/lora.safetensors"])

    assert made.download is not None
    assert made.download.unknown == ("https://example.org/lora.safetensors",)
    assert made.download.words == "2.0 GB in 2 files, of them 1 of unknown size not counted"
    assert plan(sized, "one").download is None


def test_what_a_cut_download_brought_is_not_fetched_again(sized: AppContext) -> None:
    target = sized.files.target(REMOTE)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.0123456789ab.part")
    part.touch()
    os.truncate(part, 5 * 10**8)

    made = plan(sized, "remote")

    assert made.download is not None
    assert made.download.words == "1.5 GB in 1 file; 0.5 GB more are here already"
    told = made.as_dict()["download"]
    assert (told["bytes"], told["received"]) == (1_500_000_000, 500_000_000)


def test_a_disk_that_is_too_small_is_told_before_the_download(
    sized: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(sized.root)._replace(free=5 * 10**8)
    monkeypatch.setattr("shared.app.plan.download.shutil.disk_usage", lambda folder: usage)

    made = plan(sized, "remote")

    assert made.download is not None and made.download.is_too_large
    assert f"Only 0.5 GB are free at {sized.files.roots[0]}: 1.5 GB too few" in made.download.words
    assert made.as_dict()["download"]["fits"] is False

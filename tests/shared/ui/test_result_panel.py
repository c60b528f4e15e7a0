"""What the page says: steps, downloads, errors, facts about pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.app.download import DownloadProgress
from shared.app.events import ImageDone, StepDone
from shared.quant.errors import UserError
from shared.ui import result_panel


def image(seed: int, number: int, images: int) -> ImageDone:
    return ImageDone(
        path=Path("outputs") / f"{seed}.png", seed=seed, record={"resolution": "256x384"}, image=number, images=images
    )


def test_the_bar_runs_once_over_all_pictures() -> None:
    markup = result_panel.step_status(StepDone(image=2, images=4, step=3, steps=6, seconds_left=12.3))

    assert "Picture 2 of 4 · step 3 of 6" in markup
    assert 'aria-valuenow="38"' in markup  # (1 + 3/6) / 4
    assert "about 12 s left" in markup


def test_one_picture_is_not_counted_and_unknown_time_not_guessed() -> None:
    markup = result_panel.step_status(StepDone(image=1, images=1, step=1, steps=8, seconds_left=None))

    assert "Step 1 of 8" in markup
    assert "Picture" not in markup and "left" not in markup


def test_forwards_are_told_where_a_step_takes_several() -> None:
    one = StepDone(image=1, images=1, step=3, steps=8, seconds_left=None, forwards=3)
    two = StepDone(image=1, images=1, step=3, steps=8, seconds_left=None, forwards=6)

    assert "forwards" not in result_panel.step_status(one)
    assert "Step 3 of 8 · 6 forwards" in result_panel.step_status(two)


def test_a_download_says_how_much_how_fast_and_how_long() -> None:
    progress = DownloadProgress("model.safetensors", 3_000_000_000, 12_000_000_000, 50_000_000.0)
    markup = result_panel.download_status(progress)

    assert "Downloading model.safetensors" in markup
    assert "3.0 GB of 12.0 GB · 50 MB/s · 3 min left" in markup
    assert 'aria-valuenow="25"' in markup


def test_a_download_of_unknown_size_has_no_percentage() -> None:
    markup = result_panel.download_status(DownloadProgress("tokenizer.json", 1_500_000, None, 0.0))

    assert "1.5 MB" in markup
    assert "aria-valuenow" not in markup


def test_an_error_shows_what_and_what_to_do_and_cannot_inject_markup() -> None:
    markup = result_panel.failure(UserError("<b>bad</b> size", "Take 256."))

    assert "&lt;b&gt;bad&lt;/b&gt; size" in markup
    assert "<p>Take 256.</p>" in markup
    assert 'role="alert"' in markup


def test_the_summary_of_one_picture_names_its_file() -> None:
    markup = result_panel.summary([image(7, 1, 1)], 4.26)

    assert "4.3 s · 256 × 384 · seed 7" in markup
    assert f"Saved as <code>{Path('outputs/7.png')}</code>" in markup


def test_the_summary_of_several_pictures_names_their_seeds_and_folder() -> None:
    images = [image(7, 1, 2), image(8, 2, 2)]

    assert "2 pictures · 11 s · 256 × 384 · seeds 7 to 8" in result_panel.summary(images, 11.0)
    assert "Saved in <code>outputs</code>" in result_panel.summary(images, 11.0)
    assert result_panel.pictures(images) == [
        (str(Path("outputs/7.png")), "seed 7"),
        (str(Path("outputs/8.png")), "seed 8"),
    ]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (48.4, "48 s"), (300, "5 min"), (4800, "1 h 20 min")]
)
def test_durations_are_as_exact_as_a_person_wants(seconds: float, words: str) -> None:
    assert result_panel.duration(seconds) == words

"""Progress in words; plain lines where stderr is no terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.app.download import DownloadProgress
from shared.app.events import Downloading, ImageDone, Status, StepDone
from shared.cli.progress import ProgressLine, download_remark, duration, file_size, step_words


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (StepDone(1, 1, 3, 8, None), "Step 3 of 8"),
        (StepDone(2, 4, 3, 8, 1.0), "Picture 2 of 4, step 3 of 8"),
        (StepDone(1, 1, 3, 8, None, forwards=3), "Step 3 of 8"),
        (StepDone(1, 1, 3, 8, None, forwards=6), "Step 3 of 8 (6 forwards)"),
    ],
)
def test_steps_in_words(event: StepDone, words: str) -> None:
    assert step_words(event) == words


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (DownloadProgress("a", 1_200_000_000, 12_300_000_000, 45e6), "1.2 GB of 12.3 GB, 45.0 MB/s, 4 min left"),
        (DownloadProgress("a", 0, 500, 0.0), "0 bytes of 500 bytes"),
        (DownloadProgress("a", 2_000_000, None, 1e6), "2.0 MB"),
    ],
)
def test_downloads_say_as_much_as_is_known(progress: DownloadProgress, words: str) -> None:
    assert download_remark(Downloading(progress)) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (48.4, "48 s"), (100, "2 min"), (4800, "1 h 20 min")]
)
def test_durations_are_as_exact_as_a_person_wants(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sizes_are_decimal() -> None:
    assert [file_size(size) for size in (999, 1000, 12_300_000_000)] == ["999 bytes", "1.0 kB", "12.3 GB"]


def test_without_a_terminal_the_stages_are_plain_lines_on_stderr(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with ProgressLine() as show:
        show(Status("Loading [red]Demo"))
        show(StepDone(1, 1, 1, 8, 3.0))
        show(ImageDone(tmp_path / ("long" * 60), 1, {}, 1, 1))

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"Loading [red]Demo\nSaved {tmp_path / ('long' * 60)}\n"


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(quiet=True) as show:
        show(Status("Loading"))

    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")

    with ProgressLine() as show:
        show(StepDone(1, 2, 4, 8, 48.0))

    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Picture 1 of 2, step 4 of 8" in captured.err
    assert "48 s left" in captured.err

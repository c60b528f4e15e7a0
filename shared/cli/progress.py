"""The terminal's progress: one line with a bar on stderr, plain lines where stderr is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from shared.app.events import Downloading, Event, ImageDone, Status, StepDone


class ProgressLine:
    """Shows a session's events; a context manager, and callable with an event.

    quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._plain = not console.is_terminal and not quiet
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[remark]}"),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._line = self._progress.add_task("Starting", total=None, remark="")

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Status):
            self._show(event.text, fraction=None, remark="")
            self._say(event.text)
        elif isinstance(event, Downloading):
            progress = event.progress
            fraction = progress.done / progress.total if progress.total else None
            self._show(f"Downloading {progress.file}", fraction=fraction, remark=download_remark(event))
        elif isinstance(event, StepDone):
            fraction = (event.image - 1 + event.step / event.steps) / event.images
            self._show(step_words(event), fraction=fraction, remark=left_words(event.seconds_left))
        elif isinstance(event, ImageDone):
            self._say(f"Saved {event.path}")

    def _show(self, words: str, *, fraction: float | None, remark: str) -> None:
        total = None if fraction is None else 1.0  # None: a bar that only moves
        self._progress.update(self._line, description=words, total=total, completed=fraction or 0.0, remark=remark)

    def _say(self, words: str) -> None:
        if self._plain:
            self._console.print(words, soft_wrap=True, markup=False, highlight=False)


def step_words(event: StepDone) -> str:
    """ "Step 3 of 8", with the picture's number in a batch, and with the forwards where a step takes more than one."""
    picture = f"Picture {event.image} of {event.images}, step" if event.images > 1 else "Step"
    forwards = f" ({event.forwards} forwards)" if event.forwards > event.step else ""
    return f"{picture} {event.step} of {event.steps}{forwards}"


def left_words(seconds: float | None) -> str:
    """ "12 s left", "3 min left"; empty when nobody knows."""
    return "" if seconds is None else f"{duration(seconds)} left"


def download_remark(event: Downloading) -> str:
    """ "1.2 of 12.3 GB, 45 MB/s, 4 min left", as far as it is known."""
    progress = event.progress
    if not progress.total:
        return file_size(progress.done)
    parts = [f"{file_size(progress.done)} of {file_size(progress.total)}"]
    if progress.bytes_per_second > 0:
        seconds = (progress.total - progress.done) / progress.bytes_per_second
        parts += [f"{file_size(progress.bytes_per_second)}/s", left_words(seconds)]
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds below 100, then minutes, then hours."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def file_size(size: float) -> str:
    """Bytes in decimal units, as the Hub shows them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"

"""The right side of the page: what is happening, the pictures, and where they were saved. Markup in, no callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import gradio as gr

from shared.app.download import DownloadProgress
from shared.app.events import ImageDone, StepDone
from shared.app.loras import match_words
from shared.quant.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPanel:
    """Status above, pictures in the middle, facts about them below."""

    status: gr.HTML
    gallery: gr.Gallery
    info: gr.HTML
    seeds: gr.State  # of the pictures in the gallery, in their order


def build_result_panel() -> ResultPanel:
    """Lay out the empty result area."""
    status = gr.HTML(elem_id="status")
    gallery = gr.Gallery(
        show_label=False, elem_id="gallery", columns=2, object_fit="contain", interactive=False,
        buttons=["download", "fullscreen"], height="auto",
    )  # fmt: skip
    info = gr.HTML(elem_id="info")
    return ResultPanel(status=status, gallery=gallery, info=info, seeds=gr.State([]))


def working(words: str, *, fraction: float | None = None, remark: str = "") -> str:
    """Status while something is under way. fraction: 0 to 1, or None when nobody knows how long it takes."""
    if fraction is None:
        bar = '<div class="bar unknown" role="progressbar"><div></div></div>'
    else:
        percent = round(100 * min(1.0, max(0.0, fraction)))
        bar = (
            f'<div class="bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}">'
            f'<div style="width:{percent}%"></div></div>'
        )
    words_line = f"<span>{escape(words)}</span><span class='remark'>{escape(remark)}</span>"
    return f'<div class="status working" role="status"><div class="words">{words_line}</div>{bar}</div>'


def note(words: str) -> str:
    """Status when nothing is under way and nothing is wrong."""
    return f'<div class="status note" role="status">{escape(words)}</div>' if words else ""


def failure(error: UserError) -> str:
    """What went wrong and what to do about it; stays until the next start."""
    hint = f"<p>{escape(error.hint)}</p>" if error.hint else ""
    return f'<div class="status failure" role="alert"><p class="what">{escape(error.message)}</p>{hint}</div>'


def step_status(event: StepDone) -> str:
    """Bar and words after one step; the bar runs once over all pictures."""
    picture = f"Picture {event.image} of {event.images} · " if event.images > 1 else ""
    fraction = (event.image - 1 + event.step / event.steps) / event.images
    left = f"about {duration(event.seconds_left)} left" if event.seconds_left else ""
    forwards = f" · {event.forwards} forwards" if event.forwards > event.step else ""
    words = f"{picture}step {event.step} of {event.steps}{forwards}".capitalize()
    return working(words, fraction=fraction, remark=left)


def download_status(progress: DownloadProgress) -> str:
    """Bar and words while a file of the model comes from the network."""
    words = f"Downloading {progress.file}"
    if not progress.total:
        return working(words, remark=file_size(progress.done))
    remark = f"{file_size(progress.done)} of {file_size(progress.total)}"
    if progress.bytes_per_second > 0:
        seconds = (progress.total - progress.done) / progress.bytes_per_second
        remark += f" · {file_size(round(progress.bytes_per_second))}/s · {duration(seconds)} left"
    return working(words, fraction=progress.done / progress.total, remark=remark)


def pictures(images: Sequence[ImageDone]) -> list[tuple[str, str | None]]:
    """Gallery entries; several pictures carry their seed so that one of them can be drawn again alone."""
    return [(str(image.path), f"seed {image.seed}" if len(images) > 1 else None) for image in images]


def summary(images: Sequence[ImageDone], seconds: float) -> str:
    """One line of facts about the finished pictures, one with where they are, one for each LoRA that was on."""
    first = images[0]
    count = f"{len(images)} pictures" if len(images) > 1 else ""
    size = str(first.record.get("resolution", "")).replace("x", " × ")
    seeds = f"seeds {first.seed} to {images[-1].seed}" if len(images) > 1 else f"seed {first.seed}"
    facts = " · ".join(part for part in (count, duration(seconds), size, seeds) if part)
    saved = "Saved in" if len(images) > 1 else "Saved as"
    place = first.path.parent if len(images) > 1 else first.path
    matches = first.record.get("provenance", {}).get("loras", ())
    loras = "".join(f"<p>{escape(match_words(match))}</p>" for match in matches)
    return f'<p class="facts">{escape(facts)}</p><p>{saved} <code>{escape(str(place))}</code></p>{loras}'


def duration(seconds: float) -> str:
    """As exact as a person wants it: "3.2 s", "48 s", "5 min" or "1 h 20 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def file_size(size: int) -> str:
    """Bytes in decimal units, as the Hub shows them: "12.3 GB"."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB" if size < 1e7 else f"{size / 1e6:.0f} MB"

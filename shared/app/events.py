"""What a generation tells on its way, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.app.download import DownloadProgress

STAGES = ("load", "text", "denoise", "decode", "total")


@dataclass(frozen=True, slots=True)
class Status:
    """What is going on, in words."""

    text: str


@dataclass(frozen=True, slots=True)
class Downloading:
    """A file of the model is on its way from the network."""

    progress: DownloadProgress


@dataclass(frozen=True, slots=True)
class StepDone:
    """step of steps is done in picture image of images, all counted from 1. seconds_left: of the whole batch.

    forwards: transformer calls that this picture has taken so far; 0 where the family does not count them.
    """

    image: int
    images: int
    step: int
    steps: int
    seconds_left: float | None
    forwards: int = 0


@dataclass(frozen=True, slots=True)
class ImageDone:
    """A picture is on the disk. record: what is written into it. image of images, counted from 1."""

    path: Path
    seed: int
    record: dict[str, Any]
    image: int
    images: int


Event = Status | Downloading | StepDone | ImageDone
OnEvent = Callable[[Event], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """What was drawn and what it took.

    forwards: transformer calls per picture. seconds: wall-clock by stage (STAGES); downloads count in total only, and
    loading a text encoder that was not needed at once counts as text.
    peak_rss_mb, peak_vram_mb: MiB; None where the system does not tell, and without an NVIDIA GPU.
    kernels: what multiplied the packed layers, a line each. files: path and SHA-256 of every weights file used.
    loras: for each file "matched" of its "total" keys, and the "unmatched". notes: what was done otherwise than planned
    because memory ran out, in words. lossy: what a step cache left out of the last picture, in words. cancelled: fewer
    pictures than asked for.
    """

    images: list[ImageDone]
    preset: str
    forwards: int
    seconds: dict[str, float]
    peak_rss_mb: float | None
    peak_vram_mb: float | None
    kernels: list[str]
    files: list[dict[str, str]]
    loras: list[dict[str, Any]]
    notes: list[str]
    lossy: str = ""
    cancelled: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; pictures as path and seed."""
        return {
            "images": [{"path": str(image.path), "seed": image.seed} for image in self.images],
            "preset": self.preset,
            "forwards": self.forwards,
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            "peak_rss_mb": _rounded(self.peak_rss_mb),
            "peak_vram_mb": _rounded(self.peak_vram_mb),
            "kernels": self.kernels,
            "files": self.files,
            "loras": self.loras,
            "notes": self.notes,
            **({"lossy": self.lossy} if self.lossy else {}),
            "cancelled": self.cancelled,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 1)

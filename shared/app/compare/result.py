"""What a comparison finds: a row for each model, the reference first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.format_order import Finding

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One format's figures: means over all pictures, except seconds (the median, loading apart) and psnr (all pixels).

    peak_rss_mb, peak_vram_mb: MiB of the drawing process. psnr: dB, infinite where all pictures are equal.
    latent_error: of the last latents, relative. adherence: share of pictures that keep all promises; kept: share that
    keeps each; lost, gained: pictures that keep all with the reference only, and with this only. lora, lora_latents:
    correlation of what the LoRA changes, in pictures and in latents. problem: why there are no figures.
    """

    name: str
    file: str
    bytes: int
    load_seconds: float = 0.0
    seconds: float = 0.0
    peak_rss_mb: float | None = None
    peak_vram_mb: float = 0.0
    psnr: float = math.inf
    ssim: float = 1.0
    latent_error: float = 0.0
    adherence: float | None = None
    kept: Mapping[str, float] = field(default_factory=dict)
    lost: int = 0
    gained: int = 0
    lora: float | None = None
    lora_latents: float | None = None
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: JSON has no infinity, so equal pictures have a PSNR of null."""
        return {key: _for_json(value) for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The rows, the reference first; whether they are in the order that is expected; and where the rest lies."""

    preset: str
    device: str
    dtype: str
    prompts: Sequence[str]
    settings: Mapping[str, Any]
    lora: str
    rows: Sequence[Row]
    sheet: Path
    report: Path
    order: Sequence[Finding] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "rows": [row.as_dict() for row in self.rows],
            "sheet": str(self.sheet),
            "report": str(self.report),
        }


def _for_json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

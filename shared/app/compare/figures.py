"""A row's figures: what one model drew, measured against what the reference drew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from shared.app.compare.result import Row
from shared.app.drawing import Drawn, Spent
from shared.app.picture_metrics import correlation, psnr, relative_error, ssim
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import RunError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Pictures:
    """What one model drew: plain, and with the LoRA when there is one."""

    plain: list[Drawn]
    with_lora: list[Drawn]
    spent: Spent


def received(messages: Iterator[Drawn | Spent], count: int, say: Callable[[str], None]) -> Pictures:
    """What a drawing process sends: `count` pictures without the LoRA, then those with it, then their account."""
    drawn: list[Drawn] = []
    for message in messages:
        if isinstance(message, Spent):
            return Pictures(drawn[:count], drawn[count:], message)
        drawn.append(message)
        say(f"picture {len(drawn)}")
    raise RunError("The pictures ended before their account.")


def row_of(name: str, path: Path, found: Pictures, reference: Pictures) -> Row:
    """One model's figures, as far as pictures tell them."""
    import numpy as np

    pairs = list(zip(found.plain, reference.plain, strict=True))
    return Row(
        name=name,
        file=str(path),
        bytes=file_size(path),
        load_seconds=found.spent.load_seconds,
        seconds=median(drawn.seconds for drawn in found.plain),
        peak_rss_mb=found.spent.peak_rss_mb,
        peak_vram_mb=found.spent.peak_vram_mb,
        psnr=psnr(np.stack([a.picture for a, _ in pairs]), np.stack([b.picture for _, b in pairs])),
        ssim=fmean(ssim(a.picture, b.picture) for a, b in pairs),
        latent_error=fmean(relative_error(a.latents, b.latents) for a, b in pairs),
        lora=_alike(found, reference, lambda drawn: drawn.picture),
        lora_latents=_alike(found, reference, lambda drawn: drawn.latents),
    )


def _alike(found: Pictures, reference: Pictures, values: Callable[[Drawn], NDArray]) -> float | None:
    """How alike the LoRA's change of all pictures is to its change of the reference's; None without a LoRA."""
    import numpy as np

    def change(pictures: Pictures) -> NDArray:
        pairs = zip(pictures.with_lora, pictures.plain, strict=False)  # the first ones, where not all are drawn so
        return np.stack([np.subtract(values(a), values(b), dtype=np.float64) for a, b in pairs])

    return correlation(change(found), change(reference)) if found.with_lora else None


def file_size(path: Path) -> int:
    """Bytes of a checkpoint, all its parts."""
    return sum(file.stat().st_size for file in Checkpoint.open(path).files)

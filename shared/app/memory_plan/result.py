"""A memory plan: what was decided about weights and decode, and the peaks that leads to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.app.memory import MIB
from shared.app.offload import Profile

Engine = Literal["direct", "mmgp", "stream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What was decided, and the peaks it leads to. peaks_mb: by stage, on the GPU, or on a CPU in RAM.

    gpu_bytes: to be used on the GPU at most. cap: the same if it was asked for, else None. budget: bytes of weights on
    the GPU at once, and lock: of RAM to page-lock, both for the streamer. tile: latent cells, 0 in one piece.
    decode_ways: tiles that take less memory, from large to small, in words. profile: for "mmgp". step_seconds:
    predicted for each engine that was weighed.
    """

    engine: Engine
    reason: str
    profile: Profile | None = None
    gpu_bytes: int = 0
    budget: int = 0
    lock: int = 0
    cap: int | None = None
    tile: int = 0
    decode_ways: Mapping[int, str] = field(default_factory=dict)
    peaks_mb: Mapping[str, float]
    ram_mb: float
    vram_mb: float  # 0 without a GPU of its own
    sentences: Sequence[str]
    step_seconds: Mapping[str, float]

    @property
    def name(self) -> str:
        """In a word, or two."""
        return self.engine if self.profile is None else f"profile {self.profile.number:g}"

    @property
    def words(self) -> str:
        """In one line, for people."""
        if not self.vram_mb:
            return " ".join([f"Takes about {_size(self.ram_mb)} of RAM.", *self.sentences[1:]])
        amounts = f"Takes about {_size(self.vram_mb)} on the GPU and {_size(self.ram_mb)} of RAM."
        return " ".join([amounts, *self.sentences])

    def as_dict(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "reason": self.reason,
            "profile": self.profile and self.profile.number,
            "budget_mb": round(self.budget / MIB, 1),
            "cap_mb": self.cap and round(self.cap / MIB, 1),
            "VAE_tile_size": self.tile,
            "peaks_mb": {stage: round(peak, 1) for stage, peak in self.peaks_mb.items()},
            "ram_mb": round(self.ram_mb, 1),
            "vram_mb": round(self.vram_mb, 1),
            "plan": list(self.sentences),
            "predicted_step_seconds": {name: round(seconds, 4) for name, seconds in self.step_seconds.items()},
        }


def _size(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"

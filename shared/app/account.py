"""What a generation has taken and found so far: it ends in the result and, picture by picture, in the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.events import STAGES
from shared.app.plan import GenerationPlan

if TYPE_CHECKING:
    from shared.app.sampling_settings import SamplingSettings


@dataclass(slots=True)
class Account:
    """seconds: by stage. forwards, saved: of the last picture, as transformer calls done and left out by a step cache.

    kernels, files, loras: as in GenerationResult. safer: what the model had to do against bad numbers, by name.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    forwards: int = 0
    saved: int = 0
    kernels: list[str] = field(default_factory=list)
    files: list[dict[str, str]] = field(default_factory=list)
    loras: list[dict[str, Any]] = field(default_factory=list)
    safer: dict[str, str] = field(default_factory=dict)

    def begin_picture(self) -> None:
        """Count forwards from zero."""
        self.forwards = self.saved = 0

    def add(self, report: Mapping[str, Any]) -> None:
        """One drawing, by the report of a pipeline object (contract C1d)."""
        self.forwards += int(report["forwards"])
        self.saved += int(report.get("saved", 0))
        for stage, seconds in report["seconds"].items():
            self.seconds[stage] += seconds

    def lossy(self, sampling: SamplingSettings) -> str:
        """What a step cache has done to the last picture, in words; "" without one."""
        if not sampling.step_cache:
            return ""
        of = self.forwards + self.saved
        return f"step cache {sampling.step_cache:g}: {self.saved} of {of} forwards left out"

    def provenance(self, plan: GenerationPlan, lossy: str, notes: Sequence[str]) -> dict[str, Any]:
        """For the record of a picture: what it was computed with. Files are named, their folders are not: a picture
        that is passed on should not tell where its maker keeps files."""
        loras = [match | {"file": Path(match["file"]).name} for match in self.loras]
        return {
            "forwards": self.forwards,
            "device": plan.machine.device.name,
            "dtype": plan.machine.dtype.value,
            "precision": plan.settings.sampling.precision,
            "attention": plan.attention.value,
            **({"kernels": self.kernels} if self.kernels else {}),
            **({"safer": self.safer} if self.safer else {}),
            **({"lossy": lossy} if lossy else {}),
            **({"notes": list(notes)} if notes else {}),
            "files": [{"name": Path(file["path"]).name, "sha256": file["sha256"]} for file in self.files],
            **({"loras": loras} if loras else {}),
        }

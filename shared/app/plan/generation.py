"""A generation's plan: everything decided for it, and how that is decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.device import DeviceInfo, choose_attention, ram_bytes
from shared.app.loras import Strength
from shared.app.memory import MIB, MemoryEstimate
from shared.app.memory_plan import MemoryPlan, Relief
from shared.app.plan.download import Download, find_download
from shared.app.plan.files import PlannedFile, annotator_files, error_lora, find_files, find_lora, wanted_files
from shared.app.plan.machine import Machine, in_safer_type
from shared.app.plan.requested import Choice, choose_compute, requested_attention
from shared.app.plan.weighing import weigh
from shared.app.presets import Preset, attention_rule
from shared.quant.kernels import REFERENCE

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.settings import GenerationSettings

BY_PUBLISHED_SIZES = "From the published sizes, exact once the files are here:"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """Everything decided for one generation. download: None when every file is here. ram: bytes of this machine's.

    memory and placement are None while a weights file is missing whose size is not published.
    """

    preset: Preset
    settings: GenerationSettings
    files: tuple[PlannedFile, ...]
    lora_strengths: tuple[Strength, ...]  # of the files with the role "lora", in order
    machine: Machine
    attention: Choice
    compute: Choice  # one of kernels.COMPUTES; which kernels that comes to is known when the weights are loaded
    safer: tuple[str, ...]  # what an earlier drawing had to do against bad numbers and this one begins with, by name
    offload: Choice
    memory: MemoryEstimate | None
    placement: MemoryPlan | None
    download: Download | None = None
    ram: int

    @property
    def missing(self) -> tuple[PlannedFile, ...]:
        """Files that are not on this machine."""
        return tuple(file for file in self.files if file.path is None)

    @property
    def to_download(self) -> tuple[PlannedFile, ...]:
        """The missing files that can be downloaded."""
        return tuple(file for file in self.missing if file.is_remote)

    @property
    def memory_words(self) -> str:
        """What the pictures will take and where, in one line; "" where that is not known."""
        if self.memory is None or self.placement is None:
            return ""
        words = f"{BY_PUBLISHED_SIZES} {self.placement.words}" if self.memory.published else self.placement.words
        return words if self.fits else f"{words} {self.fit_words}"

    @property
    def short_mb(self) -> tuple[float, float]:
        """MiB by which the estimate exceeds (the RAM of this machine, what may be used on the GPU), 0 where it fits."""
        placed = self.placement
        if placed is None:
            return 0.0, 0.0
        of_gpu = placed.vram_mb - placed.gpu_bytes / MIB if placed.vram_mb else 0.0
        return max(0.0, placed.ram_mb - self.ram / MIB), max(0.0, of_gpu)

    @property
    def fits(self) -> bool:
        """Whether this machine has what the estimate asks for; also True where there is no estimate."""
        return not any(self.short_mb)

    @property
    def fit_words(self) -> str:
        """Whether it fits this machine, in one sentence, for people."""
        of_ram, of_gpu = self.short_mb
        have = f"This machine has {self.ram / MIB:,.0f} MiB of RAM"
        have += f", {of_ram:,.0f} MiB too few" if of_ram else ""
        if self.placement is not None and self.placement.vram_mb:
            have += f", and {self.placement.gpu_bytes / MIB:,.0f} MiB to use on the GPU"
            have += f", {of_gpu:,.0f} MiB too few" if of_gpu else ""
        return f"{have}: it fits." if self.fits else f"{have}."

    def paths(self, role: str) -> tuple[Path, ...]:
        """The files of a role that are on this machine, in order."""
        return tuple(file.path for file in self.files if file.role == role and file.path is not None)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        device = self.machine.device
        return {
            "preset": self.preset.id,
            "settings": self.settings.as_record(),
            "files": [
                {
                    "role": f.role,
                    "url": f.url,
                    "path": f.path and str(f.path),
                    "bytes": f.bytes,
                    "published_bytes": f.published,
                    "note": f.note,
                }
                for f in self.files
            ],
            "to_download": [file.url for file in self.to_download],
            "download": self.download and self.download.as_dict(),
            "missing": [file.url for file in self.missing if not file.is_remote],
            "device": {"value": device.kind, "name": device.name, "reason": device.reason},
            "dtype": self.machine.dtype.as_dict(),
            "attention": self.attention.as_dict(),
            "compute": self.compute.as_dict(),
            "offload": self.offload.as_dict(),
            "memory": self.memory
            and self.placement
            and {**self.memory.as_dict(), **self.placement.as_dict(), "fits": self.fits},
        }


def make_plan(
    ctx: AppContext,
    preset: Preset,
    settings: GenerationSettings,
    machine: Machine,
    relief: Relief | None = None,
) -> GenerationPlan:
    """Decide everything for one generation of `preset` with `settings` on `machine`. Touches no network.

    relief: what is to be kept to because memory ran out before. Raises UserError for a LoRA that is nowhere, a LoRA
    strength that is none, an unknown attention, compute, offload or profile, a weights file with a broken header.
    """
    preset = preset.configured(str(settings.extra.get("config") or ""))
    files = find_files(ctx, wanted_files(ctx, preset, machine.device))
    chosen = (*error_lora(files, settings), *preset.loras, *settings.loras)
    loras = [(choice, find_lora(ctx, preset, choice)) for choice in chosen]
    remembered = _remembered(ctx, files, machine.device)
    if requested_attention(ctx) != "auto":
        remembered = {name: why for name, why in remembered.items() if name != "attention"}
    machine = in_safer_type(machine, remembered)
    lora_paths = [file.path for _, file in loras if file.path is not None]
    offload, memory, placement = weigh(ctx, preset, settings, files, lora_paths, machine, relief)
    every = (*files, *(file for _, file in loras), *annotator_files(ctx, settings))
    return GenerationPlan(
        preset=preset,
        settings=settings,
        files=every,
        lora_strengths=tuple(choice.strength() for choice, _ in loras),
        machine=machine,
        attention=_attention(ctx, preset, machine.device, remembered),
        compute=_compute(ctx, remembered),
        safer=tuple(remembered),
        offload=offload,
        memory=memory,
        placement=placement,
        download=find_download(ctx, every),
        ram=ram_bytes(),
    )


def _remembered(ctx: AppContext, files: Sequence[PlannedFile], device: DeviceInfo) -> Mapping[str, str]:
    """What bad numbers made necessary for the transformer's file on this device, and why."""
    weights = next((file.path for file in files if file.role == "transformer" and file.path is not None), None)
    return {} if weights is None else ctx.safer_choices().find(weights, device)


def _attention(ctx: AppContext, preset: Preset, device: DeviceInfo, remembered: Mapping[str, str]) -> Choice:
    rule = attention_rule(preset, device.capability)
    unsafe = preset.model_def.get("unsafe_attention") or ()
    chosen = Choice(*choose_attention(requested_attention(ctx), rule, device, unsafe))
    return Choice("sdpa", remembered["attention"]) if "attention" in remembered else chosen


def _compute(ctx: AppContext, remembered: Mapping[str, str]) -> Choice:
    chosen = choose_compute(ctx)
    return Choice(REFERENCE, remembered["compute"]) if chosen.value == "auto" and "compute" in remembered else chosen

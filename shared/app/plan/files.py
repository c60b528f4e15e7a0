"""The files of a plan: which are wanted, and where each lies on this machine."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.app.annotators import annotator_of, folder_of
from shared.app.device import DeviceInfo
from shared.app.plan.requested import requested_quantization
from shared.app.presets import FilePlan, LoraChoice, Preset, choose_files
from shared.preprocess import FILES
from shared.quant.checkpoint import SUFFIXES
from shared.quant.error_lora import find_beside
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.settings import GenerationSettings

LORA_DOWNLOADS = "loras"  # folder below the first checkpoint root for LoRA files named by URL


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One file of the plan. role: as in FileWant, or "lora". path, bytes: None while it is not on this machine.

    note: how sure it is that the path is the file, "" where there is no doubt. published: as in FileWant. received:
    bytes of a download of it that was cut short and will be continued.
    """

    role: str
    url: str
    subfolder: str = ""
    path: Path | None = None
    note: str = ""
    published: int | None = None
    received: int = 0

    @property
    def is_remote(self) -> bool:
        """Whether it can be downloaded; else it must be put in place by hand."""
        return self.url.startswith(("https://", "http://"))

    @property
    def to_come(self) -> int:
        """Bytes of it that a download still brings; 0 where its size is not known."""
        return 0 if self.path is not None else max(0, (self.published or 0) - self.received)

    @property
    def bytes(self) -> int | None:
        return self.path.stat().st_size if self.path is not None and self.path.is_file() else None


def wanted_files(ctx: AppContext, preset: Preset, device: DeviceInfo | None = None) -> FilePlan:
    """The preset's files by the flags and the configuration: of alternatives, those in the quantization asked for."""
    transformer = requested_quantization(ctx, "transformer_quantization")
    encoder = requested_quantization(ctx, "text_encoder_quantization")
    return choose_files(preset, transformer, device, text_encoder_preference=encoder or None)


def find_files(ctx: AppContext, chosen: FilePlan) -> list[PlannedFile]:
    """The chosen files, each with its place on this machine if it is here."""
    found = [(want, ctx.files.locate(want.url, subfolder=want.subfolder)) for want in chosen.wants]
    return [
        PlannedFile(
            role=want.role,
            url=want.url,
            subfolder=want.subfolder,
            path=located.path,
            note=located.note,
            published=want.published,
            received=0 if located.path is not None else ctx.files.received(want.url, subfolder=want.subfolder),
        )
        for want, located in found
    ]


def beside_transformer(files: Sequence[PlannedFile]) -> Path | None:
    """The error-correction LoRA that lies beside the transformer's file."""
    transformer = next((file.path for file in files if file.role == "transformer"), None)
    return None if transformer is None else find_beside(transformer)


def error_lora(files: Sequence[PlannedFile], settings: GenerationSettings) -> tuple[LoraChoice, ...]:
    """The one beside the transformer's file, unless it is turned off."""
    path = beside_transformer(files) if settings.error_lora_strength else None
    return () if path is None else (LoraChoice(str(path), f"{settings.error_lora_strength:g}"),)


def find_lora(ctx: AppContext, preset: Preset, choice: LoraChoice) -> PlannedFile:
    """A LoRA as given, in the family's LoRA folder, or below a checkpoint root. Raises UserError when it is nowhere."""
    folder = ctx.lora_folder(preset)
    if choice.file.startswith(("https://", "http://")):
        url = choice.file.partition("|")[0]
        beside = folder / url.partition("?")[0].rsplit("/", 1)[-1]
        path = beside if beside.is_file() else ctx.files.find(url, subfolder=LORA_DOWNLOADS)
        return PlannedFile(role="lora", url=url, subfolder=LORA_DOWNLOADS, path=path)
    for path in (Path(choice.file).expanduser(), folder / choice.file, ctx.files.find(choice.file)):
        if path is not None and path.is_file():
            return PlannedFile(role="lora", url=choice.file, path=path)
    there = [p.relative_to(folder).as_posix() for suffix in SUFFIXES for p in folder.rglob(f"*{suffix}")]
    closest = difflib.get_close_matches(choice.file, there, n=3, cutoff=0.5)
    raise UserError(
        f"The LoRA file {choice.file} was not found, neither as given nor in {folder}.",
        f"Closest there: {', '.join(closest)}." if closest else "Check the name, or name its folder with --lora-dir-*.",
    )


def annotator_files(ctx: AppContext, settings: GenerationSettings) -> list[PlannedFile]:
    """What the preprocessor of the control picture needs."""
    name = annotator_of(settings.edit)
    found = [(file.url, ctx.files.locate(file.url, subfolder=folder_of(name))) for file in FILES.get(name, ())]
    return [
        PlannedFile(role="annotator", url=url, subfolder=folder_of(name), path=located.path, note=located.note)
        for url, located in found
    ]

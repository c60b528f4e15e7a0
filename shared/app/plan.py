"""What a generation will use, decided before anything is loaded: files, device, number type, offload, memory.

Every choice carries its reason. Planning needs no torch where the machine has no GPU, so `generate --dry-run` is quick.
"""

from __future__ import annotations

import difflib
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.annotators import annotator_of, folder_of
from shared.app.device import DeviceInfo, choose_attention, choose_dtype, detect, ram_bytes
from shared.app.loras import Strength
from shared.app.memory import (
    MIB,
    STAGES,
    MemoryEstimate,
    ModuleShapes,
    PublishedModule,
    estimate_memory,
    free_ram_bytes,
    free_vram_bytes,
)
from shared.app.memory_plan import MemoryPlan, Relief, parse_size, plan_memory, unknown_sizes
from shared.app.presets import GB, QUANTIZATIONS, FilePlan, LoraChoice, Preset, attention_rule, choose_files
from shared.preprocess import FILES
from shared.quant.checkpoint import SUFFIXES
from shared.quant.error_lora import find_beside
from shared.quant.errors import UserError
from shared.quant.kernels import COMPUTES, REFERENCE

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.settings import GenerationSettings

LORA_DOWNLOADS = "loras"  # folder below the first checkpoint root for LoRA files named by URL

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
BY_PUBLISHED_SIZES = "From the published sizes, exact once the files are here:"
_PRESET_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
VAE_DTYPE = "float32"  # half precision shows as banding in smooth skies, and float16 overflows in some VAEs

# Where a GPU driver shows itself on Linux: NVIDIA, NVIDIA under WSL, AMD.
_GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
_BF16_CPU_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and why, in words."""

    value: str
    reason: str


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """What is to be fetched before a plan can be followed.

    nbytes: still to come, of the files whose size is published; received: of the same, here already. small: how many
    tokenizer and configuration files are not counted. unknown: addresses of others that are not. folder: where it
    goes. free: bytes there, None where not known.
    """

    files: int
    nbytes: int
    received: int
    small: int
    unknown: tuple[str, ...]
    folder: Path
    free: int | None

    @property
    def is_too_large(self) -> bool:
        """Whether it is known not to fit the disk."""
        return self.free is not None and self.nbytes > self.free

    @property
    def words(self) -> str:
        """In one line, for people: how much, what is not counted, and whether the disk is too small."""
        count = "1 file" if self.files == 1 else f"{self.files} files"
        if not self.nbytes:
            return f"{count} of unknown size"
        uncounted = [f"{self.small} small"] if self.small else []
        uncounted += [f"{len(self.unknown)} of unknown size"] if self.unknown else []
        amount = f"{_gb(self.nbytes)} in {count}"
        amount += f", of them {' and '.join(uncounted)} not counted" if uncounted else ""
        amount += f"; {_gb(self.received)} more are here already" if self.received else ""
        if self.free is None or not self.is_too_large:
            return amount
        return f"{amount}. Only {_gb(self.free)} are free at {self.folder}: {_gb(self.nbytes - self.free)} too few"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "files": self.files,
            "bytes": self.nbytes,
            "received": self.received,
            "unknown": list(self.unknown),
            "folder": str(self.folder),
            "free": self.free,
            "fits": not self.is_too_large,
        }


@dataclass(frozen=True, slots=True)
class Machine:
    """The device to compute on and the number type to compute in."""

    device: DeviceInfo
    dtype: Choice  # "float32", "bfloat16" or "float16"


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
            "dtype": _choice_dict(self.machine.dtype),
            "attention": _choice_dict(self.attention),
            "compute": _choice_dict(self.compute),
            "offload": _choice_dict(self.offload),
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
    chosen = (*_error_lora(files, settings), *preset.loras, *settings.loras)
    loras = [(choice, _find_lora(ctx, preset, choice)) for choice in chosen]
    remembered = _remembered(ctx, files, machine.device)
    machine = _in_safer_type(machine, remembered)
    rule = attention_rule(preset, machine.device.capability)
    requested = str(getattr(ctx.args, "attention", "") or ctx.config.get("attention") or "auto")
    unsafe = preset.model_def.get("unsafe_attention") or ()
    attention = Choice(*choose_attention(requested, rule, machine.device, unsafe))
    if requested != "auto":
        remembered = {name: why for name, why in remembered.items() if name != "attention"}
    elif "attention" in remembered:
        attention = Choice("sdpa", remembered["attention"])
    compute = choose_compute(ctx)
    if compute.value == "auto" and "compute" in remembered:
        compute = Choice(REFERENCE, remembered["compute"])
    lora_paths = [file.path for _, file in loras if file.path is not None]
    offload, memory, placement = _weigh(ctx, preset, settings, files, lora_paths, machine, relief)
    every = (*files, *(file for _, file in loras), *_annotator_files(ctx, settings))
    return GenerationPlan(
        preset=preset,
        settings=settings,
        files=every,
        lora_strengths=tuple(choice.strength() for choice, _ in loras),
        machine=machine,
        attention=attention,
        compute=compute,
        safer=tuple(remembered),
        offload=offload,
        memory=memory,
        placement=placement,
        download=_download(ctx, every),
        ram=ram_bytes(),
    )


def wanted_files(ctx: AppContext, preset: Preset, device: DeviceInfo | None = None) -> FilePlan:
    """The preset's files by the flags and the configuration: of alternatives, those in the quantization asked for."""
    transformer = _requested_quantization(ctx, "transformer_quantization")
    encoder = _requested_quantization(ctx, "text_encoder_quantization")
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


def requested_profile(ctx: AppContext) -> float | None:
    """The memory profile of the flag, else of the configuration; None leaves the choice to the program."""
    for value in (getattr(ctx.args, "profile", None), ctx.config.get("profile")):
        if value is not None and value != -1:
            return float(value)
    return None


def requested_offload(ctx: AppContext) -> str:
    """How weights are to be moved: the flag, else the configuration, else "auto"."""
    return str(getattr(ctx.args, "offload", None) or ctx.config.get("offload") or "auto").strip().lower()


def _requested_quantization(ctx: AppContext, key: str) -> str:
    """Of the flag, else of Wan2GP's key in the configuration; "" leaves it to the order of the preset's files."""
    asked = str(getattr(ctx.args, key, None) or ctx.config.get(key) or "").strip().lower()
    if asked and asked not in QUANTIZATIONS:
        flag = f"--{key.replace('_', '-')}"
        raise UserError(f"{flag} {asked}: there is no such choice.", f"Choose from: {', '.join(QUANTIZATIONS)}.")
    return asked


def choose_compute(ctx: AppContext) -> Choice:
    """How packed weights are to be multiplied: the flag, else the configuration, else "auto".

    Raises UserError for a kind that does not exist.
    """
    flag = str(getattr(ctx.args, "compute", None) or "")
    asked = (flag or str(ctx.config.get("compute") or "auto")).strip().lower()
    if asked not in COMPUTES:
        raise UserError(f"Unknown kind of compute {asked!r}.", f"Choose from: {', '.join(COMPUTES)}.")
    if asked == "auto":
        return Choice(asked, "for each packed layer what is known to be fastest on this device; wgp.py doctor lists it")
    return Choice(asked, "asked for" if flag else "from the configuration")


def requested_device(ctx: AppContext) -> str:
    """The device of the --gpu flag; "" leaves the choice to the program."""
    return str(getattr(ctx.args, "gpu", None) or "")


def find_machine(preset: Preset, prefer: str = "") -> Machine:
    """Ask torch for the device and the number type. prefer: as for `device.detect`."""
    device = detect(prefer)
    demanded = preset.model_def.get("dtype")
    if demanded and device.kind == "cuda":
        return Machine(device, Choice(_PRESET_DTYPES[demanded], f"the preset demands {demanded}"))
    dtype, reason = choose_dtype(device)
    return Machine(device, Choice(str(dtype).removeprefix("torch."), reason))


def find_machine_quickly(preset: Preset, prefer: str = "") -> Machine:
    """The same without torch (whose import takes seconds) where that is possible: on Linux without a GPU driver."""
    no_gpu = prefer == "cpu" or not any(Path(file).exists() for file in _GPU_DEVICE_FILES)
    listing = Path("/proc/cpuinfo")
    if "torch" in sys.modules or prefer not in ("", "auto", "cpu") or not (no_gpu and listing.is_file()):
        return find_machine(preset, prefer)
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
    facts = dict(line.replace("\t", "").split(":", 1) for line in reversed(lines) if ":" in line)
    name = facts.get("model name", "CPU").strip()
    device = DeviceInfo("cpu", name, None, ram_bytes(), "asked for" if prefer == "cpu" else "no GPU driver found")
    has_bf16 = set(_BF16_CPU_FLAGS) & set((facts.get("flags") or facts.get("Features") or "").split())
    if has_bf16:
        return Machine(
            device,
            Choice("bfloat16", f"this CPU multiplies bfloat16 natively ({', '.join(sorted(has_bf16))})"),
        )
    return Machine(device, Choice("float32", "this CPU has no bfloat16 arithmetic, float32 is faster"))


def safer_type(machine: Machine) -> str | None:
    """The number type to take when float16 was too narrow; None when the type is as wide as another already."""
    if machine.dtype.value != "float16":
        return None
    # Half as large as float32, and though some cards only imitate bfloat16, every CUDA card knows it.
    return "bfloat16" if machine.device.kind == "cuda" else "float32"


def _remembered(ctx: AppContext, files: Sequence[PlannedFile], device: DeviceInfo) -> Mapping[str, str]:
    """What bad numbers made necessary for the transformer's file on this device, and why."""
    weights = next((file.path for file in files if file.role == "transformer" and file.path is not None), None)
    return {} if weights is None else ctx.safer_choices().find(weights, device)


def _in_safer_type(machine: Machine, remembered: Mapping[str, str]) -> Machine:
    wider = safer_type(machine) if "dtype" in remembered else None
    return machine if wider is None else Machine(machine.device, Choice(wider, remembered["dtype"]))


def _download(ctx: AppContext, files: Sequence[PlannedFile]) -> Download | None:
    """What of these files is to be fetched, None if nothing is."""
    missing = [file for file in files if file.path is None and file.is_remote]
    if not missing:
        return None
    folder = ctx.files.roots[0]
    existing = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), None)
    uncounted = {file.url: file.role for file in missing if file.published is None}
    return Download(
        files=len({file.url for file in missing}),
        nbytes=sum(file.to_come for file in missing),
        received=sum(file.received for file in missing if file.published is not None),
        small=sum(role == "companion" for role in uncounted.values()),
        unknown=tuple(url for url, role in uncounted.items() if role != "companion"),
        folder=folder,
        free=None if existing is None else shutil.disk_usage(existing).free,
    )


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 1e6:.1f} MB"


def weigh_files(ctx: AppContext, preset: Preset, files: Sequence[PlannedFile], **picture: Any) -> MemoryEstimate | None:
    """What weights and work take: by headers of the files that are here, else by published sizes and shapes.

    picture: the keywords of estimate_memory() but for the files. None where a size is not known. Raises UserError for a
    file that is here and broken.
    """
    parts = {role: [f for f in files if f.role == role] for role in ("transformer", "module", "text_encoder", "vae")}
    published = _published(ctx, preset, parts) if parts["text_encoder"] and parts["vae"] else None
    if published is None:
        return None
    known = {role: [part.path for part in found if part.path is not None] for role, found in parts.items()}
    return estimate_memory(
        transformer=[*known["transformer"], *known["module"]],
        text_encoder=next(iter(known["text_encoder"]), None),
        vae=next(iter(known["vae"]), None),
        published=published,
        **picture,
    )


def quick_decode_bytes(device: DeviceInfo, dtype: str) -> int | None:
    """Bytes per number that a picture is decoded in, None for the VAE's own.

    A CPU that multiplies bfloat16 decodes in it, unless precision is asked for; see autoencoder.quick_decoder.
    """
    return 2 if device.kind == "cpu" and dtype == "bfloat16" else None


def published_shapes(ctx: AppContext, preset: Preset) -> Mapping[str, Mapping[str, int]]:
    """What the family knows of its published modules, by name; {} of a family that tells nothing."""
    ask = getattr(ctx.presets.families.handler(preset.architecture), "query_published_shapes", None)
    return ask(preset.architecture) if callable(ask) else {}


def _published(
    ctx: AppContext, preset: Preset, files: Mapping[str, Sequence[PlannedFile]]
) -> dict[str, PublishedModule] | None:
    """By name, the modules that are not all here, as they are published; None if not all of these are known.

    files: by role.
    """
    shapes = published_shapes(ctx, preset)
    found: dict[str, PublishedModule] = {}
    for name in STAGES.values():
        parts = [*files[name], *(files["module"] if name == "transformer" else ())]
        if all(part.path is not None for part in parts):
            continue
        sizes = [part.published if part.bytes is None else part.bytes for part in parts]
        known = [size for size in sizes if size is not None]
        if name not in shapes or len(known) < len(sizes):
            return None
        found[name] = PublishedModule(
            shapes=ModuleShapes(**shapes[name]),
            nbytes=known[0],
            further=tuple(known[1:]),
            is_joined=name != "text_encoder",
            # llama.cpp's writer packs a language model's embedding table like the rest
            packs_table=name == "text_encoder" and parts[0].url.lower().endswith(".gguf"),
        )
    return found


def _weigh(
    ctx: AppContext,
    preset: Preset,
    settings: GenerationSettings,
    files: Sequence[PlannedFile],
    loras: Sequence[Path],
    machine: Machine,
    relief: Relief | None,
) -> tuple[Choice, MemoryEstimate | None, MemoryPlan | None]:
    """Where weights will live, and the memory it takes: by the headers of files that are here, else as published."""
    device = machine.device
    offload, profile = requested_offload(ctx), requested_profile(ctx)
    cap = parse_size(getattr(ctx.args, "max_vram", None) or ctx.config.get("max_vram"))
    is_exact = settings.sampling.precision == "exact"
    decode_bytes = None if is_exact else quick_decode_bytes(device, machine.dtype.value)
    estimate = weigh_files(
        ctx,
        preset,
        files,
        width=round(settings.width * settings.edit.hires_scale),  # the second pass is the larger one
        height=round(settings.height * settings.edit.hires_scale),
        tile_cells=settings.VAE_tile_size,
        compute_bytes=DTYPE_BYTES[machine.dtype.value],
        vae_bytes=DTYPE_BYTES[VAE_DTYPE],
        decode_bytes=decode_bytes,
        is_exact=is_exact,
        guided=settings.guidance_scale > 0,
        loras=loras,
        on_cpu=device.kind == "cpu",
    )
    if estimate is None:
        return Choice(*unknown_sizes(device, offload, profile)), None, None
    placement = plan_memory(
        estimate,
        device,
        ram=ram_bytes(),
        free=free_vram_bytes() if device.kind == "cuda" else free_ram_bytes(),
        cap=cap,
        offload=offload,
        profile=profile,
        relief=relief,
    )
    reason = f"{placement.reason}. {' '.join(placement.sentences)}"
    if estimate.published:
        reason = f"by the published sizes: {reason}"
    return Choice(placement.name, reason), estimate, placement


def beside_transformer(files: Sequence[PlannedFile]) -> Path | None:
    """The error-correction LoRA that lies beside the transformer's file."""
    transformer = next((file.path for file in files if file.role == "transformer"), None)
    return None if transformer is None else find_beside(transformer)


def _annotator_files(ctx: AppContext, settings: GenerationSettings) -> list[PlannedFile]:
    """What the preprocessor of the control picture needs."""
    name = annotator_of(settings.edit)
    found = [(file.url, ctx.files.locate(file.url, subfolder=folder_of(name))) for file in FILES.get(name, ())]
    return [
        PlannedFile(role="annotator", url=url, subfolder=folder_of(name), path=located.path, note=located.note)
        for url, located in found
    ]


def _error_lora(files: Sequence[PlannedFile], settings: GenerationSettings) -> tuple[LoraChoice, ...]:
    """The one beside the transformer's file, unless it is turned off."""
    path = beside_transformer(files) if settings.error_lora_strength else None
    return () if path is None else (LoraChoice(str(path), f"{settings.error_lora_strength:g}"),)


def _find_lora(ctx: AppContext, preset: Preset, choice: LoraChoice) -> PlannedFile:
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


def _choice_dict(choice: Choice) -> dict[str, str]:
    return {"value": choice.value, "reason": choice.reason}

"""Which preset to use on a machine, and why: rules as data over the presets that exist and the sizes of their files.

A preset is judged by the format of its weights (from the file's name), by how its weights fit the memory (the same
decision as before a generation, offload.automatic_profile), and by how many passes a picture takes. Sizes come from the
files that are here, and from arithmetic for those that are not: parameters x bits / 8.

The presets whose weights come with the program draw everywhere; they are the answer where nothing else fits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.app.device import BF16_CAPABILITY, GIB, DeviceInfo
from shared.app.memory import MIB, estimate_memory
from shared.app.offload import WORKING_MIB, automatic_profile
from shared.app.plan import DTYPE_BYTES, VAE_DTYPE, PlannedFile, find_files, wanted_files
from shared.app.presets import Preset
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.context import AppContext

# A CPU takes a 6B model only with this much RAM: 12.3 GB and 8.0 GB of bf16 weights, and the system's own needs.
CPU_RAM = 24 * 10**9
SHARED_MEMORY_SHARE = 0.75  # of a Mac's memory that its GPU may use, macOS's default limit

# Operations a second, slow and fast CPUs; and tokens of a 1024x1024 picture, each of which meets every parameter once.
CPU_SPEEDS = (1e11, 1e12)
_TOKENS = 4096
_FLOAT16 = (
    "this GPU computes in float16, whose range ends at 65504: should a picture end in an error about NaN, "
    "take --gpu cpu or a GPU of compute capability 8.0 or higher"
)
_EXPANDED = "its weights are expanded to 16 bits for every product here: that saves memory, not time"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """A format of weights: how files of it are named, bits per parameter of a whole file, and where it is refused.

    pattern: of the lower-case file name. packing: beginning of the packing's name (shared/quant/packings), "" for plain
    numbers. from_capability, below_capability: GPUs outside are refused with `refusal`.
    """

    name: str
    pattern: str
    bits: float
    packing: str
    from_capability: int = 0
    below_capability: int = 1000
    refusal: str = ""


_NO_FP4 = "FP4 is fast from compute capability 10.0 on (Blackwell); take INT4 or int8 on this GPU"
_NO_INT4 = "the tensor cores of compute capability 12.0 have no 4-bit integers; take FP4 on this GPU"


def _fp4(name: str, pattern: str, bits: float, packing: str) -> WeightFormat:
    return WeightFormat(name=name, pattern=pattern, bits=bits, packing=packing, from_capability=100, refusal=_NO_FP4)


def _int4(name: str, pattern: str, bits: float) -> WeightFormat:
    return WeightFormat(name=name, pattern=pattern, bits=bits, packing="svdq", below_capability=120, refusal=_NO_INT4)


# First match wins. Bits: published Z-Image files of 6.155e9 parameters (svdq int4 of rank 32, 128, 256: 3.61, 4.01 and
# 4.55 GB, fp4 of rank 32 and 128: 3.80 and 4.20 GB, NVFP4 4.51 GB, NVFP4 + MXFP8 4.84 GB, quanto int8 6.89 GB); others
# from the formats' own definitions.
WEIGHT_FORMATS = (
    _fp4("SVDQuant FP4", r"svdq.*fp4.*r32", 4.9, "svdq"),
    _fp4("SVDQuant FP4", r"svdq.*fp4", 5.5, "svdq"),
    _int4("SVDQuant INT4", r"svdq.*r32", 4.7),
    _int4("SVDQuant INT4", r"svdq.*r256", 5.9),
    _int4("SVDQuant INT4", r"svdq|nunchaku", 5.2),
    _fp4("NVFP4 + MXFP8", r"fp4.*(mixed|mxfp8)", 6.3, "nvfp4"),
    _fp4("NVFP4", r"fp4", 5.9, "nvfp4"),
    WeightFormat(name="MXFP8", pattern=r"mxfp8", bits=8.4, packing="mxfp8"),
    WeightFormat(name="FP8", pattern=r"fp8|e4m3|e5m2|f8_", bits=8.2, packing="fp8"),
    WeightFormat(name="int8", pattern=r"int8|convrot", bits=8.95, packing="int8"),
    WeightFormat(name="nf4", pattern=r"nf4|bnb", bits=5.0, packing="nf4"),
    *(
        WeightFormat(name=f"GGUF Q{number}", pattern=rf"[-_.]i?q{number}[-_.].*gguf$", bits=bits, packing="gguf")
        for number, bits in ((8, 8.5), (6, 6.6), (5, 5.6), (4, 4.7), (3, 3.6), (2, 2.8))
    ),
    WeightFormat(name="fp32", pattern=r"fp32|f32", bits=32, packing=""),
)
PLAIN = WeightFormat(name="16 bit", pattern="", bits=16, packing="")

# Parameters by family and role, for files that are not here: Z-Image's transformer, Qwen3-4B, Flux's VAE.
PARAMETERS: Mapping[str, Mapping[str, float]] = {
    "z_image": {"transformer": 6.155e9, "text_encoder": 4.02e9, "vae": 0.084e9},
}
_ROLES = ("transformer", "text_encoder", "vae")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One preset on this machine. refusal: why not, "" when it can be used. reason: how it fits.

    weights: bytes in memory of all its weights, None where that is not known. to_download: bytes, about.
    expands: see kernel_report. streamed: whether a few layers at a time travel to the GPU.
    """

    preset: str
    name: str
    format: str
    refusal: str
    reason: str
    caveats: tuple[str, ...]
    weights: int | None
    to_download: int
    passes: int
    expands: bool
    streamed: bool
    bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The preset to use and what speaks against each of the others."""

    preset: str
    reason: str
    caveats: tuple[str, ...]
    to_download: int
    others: tuple[Verdict, ...]


def advise(
    ctx: AppContext, device: DeviceInfo, dtype: str, ram: int | None, expanding: Collection[str] = ()
) -> Advice | None:
    """What to use on `device`, computing in `dtype` ("bfloat16", ...); None without any preset that can be used.

    ram: bytes of main memory, None where unknown. expanding: names of packings that the device only unpacks. Reads
    headers of files that are here, nothing else.
    """
    presets = [preset for preset in ctx.presets.presets.values() if preset.visible]
    verdicts = [_judge(ctx, preset, device, dtype, ram, expanding) for preset in presets if not preset.modules]
    own = {preset.id for preset in presets if _is_own(preset)}
    usable = sorted((v for v in verdicts if not v.refusal), key=lambda v: (v.preset in own, _rank(v)))
    if not usable:
        return None
    best = usable[0]
    reason = best.reason
    if best.preset in own and len(verdicts) > len(own):
        reason = f"no larger model fits this machine; this one came with the program ({reason})"
    others = (*usable[1:], *(v for v in verdicts if v.refusal))
    return Advice(preset=best.preset, reason=reason, caveats=best.caveats, to_download=best.to_download, others=others)


def format_of_name(url: str) -> WeightFormat:
    """The format of a weights file by its name; plain 16 bit numbers when the name says nothing."""
    name = url.partition("|")[0].partition("?")[0].replace("\\", "/").rsplit("/", 1)[-1].lower()
    return next((f for f in WEIGHT_FORMATS if re.search(f.pattern, name)), PLAIN)


def _rank(verdict: Verdict) -> tuple[float, ...]:
    """Sorts the best first: what need not be streamed, fewer passes, full speed, more bits, less to fetch.

    Among streamed ones the smallest is the fastest.
    """
    size = float(verdict.weights or 0)
    quality = size if verdict.streamed else -verdict.bits
    return (verdict.streamed, verdict.passes, verdict.expands, quality, verdict.to_download)


def _judge(
    ctx: AppContext, preset: Preset, device: DeviceInfo, dtype: str, ram: int | None, expanding: Collection[str]
) -> Verdict:
    files = find_files(ctx, wanted_files(ctx, preset, device))
    transformer = next(file for file in files if file.role == "transformer")
    found = format_of_name(transformer.url)
    refusal, weights = "", None
    try:
        weights = _weights(preset, files, DTYPE_BYTES[dtype])
    except (UserError, OSError) as error:  # a file that is here and cannot be read
        refusal = str(error)
    absent = [file.url for file in files if file.path is None and not file.is_remote]
    if absent:
        refusal = f"{absent[0]} is missing"
    fits, streamed = "", False
    if not refusal:
        refusal = _refused(found, device)
    if not refusal:
        refusal, fits, streamed = _fit(weights, device, ram, is_own=_is_own(preset))
    steps = int(preset.settings.get("num_inference_steps") or 1)
    passes = steps * (2 if float(preset.settings.get("guidance_scale") or 0) > 0 else 1)
    expands = bool(found.packing) and any(packing.startswith(found.packing) for packing in expanding)
    caveats = [_EXPANDED] if expands else []
    if device.kind == "cpu" and not _is_own(preset):
        caveats.append(_slow_cpu(preset, passes))
    if dtype == "float16" and device.kind == "cuda" and (device.capability or 0) < BF16_CAPABILITY:
        caveats.append(_FLOAT16)
    return Verdict(
        preset=preset.id,
        name=preset.name,
        format=found.name,
        refusal=refusal,
        reason=fits,
        caveats=tuple(caveats),
        weights=None if weights is None else sum(weights.values()),
        to_download=_to_download(preset, files),
        passes=passes,
        expands=expands,
        streamed=streamed,
        bits=found.bits,
    )


def _refused(found: WeightFormat, device: DeviceInfo) -> str:
    """Why a format is not for this GPU. A CPU unpacks every format alike, so none is refused there."""
    if device.kind != "cuda" or device.capability is None:
        return ""
    return "" if found.from_capability <= device.capability < found.below_capability else found.refusal


def _fit(
    weights: Mapping[str, int] | None, device: DeviceInfo, ram: int | None, *, is_own: bool
) -> tuple[str, str, bool]:
    """(why not, how it fits, whether it is streamed)."""
    if weights is None:
        return "the size of its files is not known", "", False
    total = sum(weights.values())
    if device.kind == "cuda":
        profile, reason = automatic_profile(device.total_memory, ram or 0, weights)
        if profile is not None and ram is not None and total > ram:
            return f"{_gib(total)} of weights need more than this machine's {_gib(ram)} of RAM", "", False
        return "", reason, profile is not None and any(profile.resident.values())
    if ram is None or is_own:
        return "", f"{_gib(total)} of weights", False
    needed = total + WORKING_MIB * MIB
    room = ram * SHARED_MEMORY_SHARE if device.kind == "mps" else ram
    if device.kind == "cpu":
        needed = max(needed, CPU_RAM)
    if needed > room:
        return f"takes {_gib(needed)} of RAM, this machine has {_gib(ram)}", "", False
    return "", f"{_gib(total)} of weights in {_gib(ram)} of RAM", False


def _weights(preset: Preset, files: list[PlannedFile], compute_bytes: int) -> dict[str, int] | None:
    """Bytes in memory by role: from the headers when all files are here, else from arithmetic."""
    paths = {role: [f.path for f in files if f.role == role and f.path is not None] for role in _ROLES}
    if all(paths.values()):
        estimate = estimate_memory(
            transformer=paths["transformer"],
            text_encoder=paths["text_encoder"][0],
            vae=paths["vae"][0],
            width=1024,
            height=1024,
            tile_cells=None,
            compute_bytes=compute_bytes,
            vae_bytes=DTYPE_BYTES[VAE_DTYPE],
            guided=False,
        )
        return {role: round(mb * MIB) for role, mb in estimate.weights_mb.items()}
    parameters = PARAMETERS.get(preset.family)
    if parameters is None:
        return None
    weights = {}
    for file in files:
        if file.role in parameters:
            bits = format_of_name(file.url).bits
            plain = DTYPE_BYTES[VAE_DTYPE] * 8 if file.role == "vae" else compute_bytes * 8
            weights[file.role] = round(parameters[file.role] * (bits if bits < PLAIN.bits else plain) / 8)
    return weights


def _to_download(preset: Preset, files: list[PlannedFile]) -> int:
    """Bytes to fetch, about: small files beside the weights are not counted."""
    parameters = PARAMETERS.get(preset.family, {})
    missing = [file for file in files if file.path is None and file.role in parameters]
    return sum(round(parameters[file.role] * format_of_name(file.url).bits / 8) for file in missing)


def _is_own(preset: Preset) -> bool:
    """Whether the preset's weights come with the program."""
    return bool(preset.urls) and preset.urls[0].startswith("file:")


def _slow_cpu(preset: Preset, passes: int) -> str:
    parameters = PARAMETERS.get(preset.family, {}).get("transformer")
    if parameters is None:
        return "slow: a model of this size is made for a GPU"
    operations = 2 * parameters * _TOKENS * passes
    most, least = (operations / speed / 60 for speed in CPU_SPEEDS)
    return f"slow: {least:.0f} to {most:.0f} minutes for a picture of 1024x1024 on a CPU, by arithmetic"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"

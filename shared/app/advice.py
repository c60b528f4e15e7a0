"""Which preset to use on a machine, and why: rules as data over the presets that exist and the sizes of their files.

A preset is judged by the format of its weights (from the file's name), by how its weights fit the memory (the same
decisions as before a generation), and by how many passes a picture takes. Sizes are those of a plan (plan/): of the
files that are here, else as presets state them.

The presets whose weights come with the program draw everywhere; they are the answer where nothing else fits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.app.device import BF16_CAPABILITY, GIB, DeviceInfo
from shared.app.memory import MIB, MemoryEstimate, Workload
from shared.app.memory_plan import plan_memory
from shared.app.offload import WORKING_MIB, automatic_profile
from shared.app.plan import (
    DTYPE_BYTES,
    VAE_DTYPE,
    PlannedFile,
    find_files,
    published_shapes,
    quick_decode_bytes,
    wanted_files,
    weigh_files,
)
from shared.app.presets import Preset
from shared.app.weight_formats import WeightFormat, format_of_name
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.context import AppContext

# Of RAM, left to the system and to other programs when a model computes on the CPU.
CPU_MARGIN = 2 * GIB
SHARED_MEMORY_SHARE = 0.75  # of a Mac's memory that its GPU may use, macOS's default limit

# Operations a second, slow and fast CPUs; and tokens of a picture, each of which meets every parameter once.
CPU_SPEEDS = (1e11, 1e12)
_SIDE, _TOKENS = 1024, 4096
_FLOAT16 = (
    "this GPU computes in float16, whose range ends at 65504: should a picture end in an error about NaN, "
    "take --gpu cpu or a GPU of compute capability 8.0 or higher"
)
_EXPANDED = "its weights are expanded to 16 bits for every product here: that saves memory, not time"


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
    refusal, estimate = "", None
    try:
        estimate = _weigh(ctx, preset, files, device, dtype)
    except (UserError, OSError) as error:  # a file that is here and cannot be read
        refusal = str(error)
    absent = [file.url for file in files if file.path is None and not file.is_remote]
    if absent:
        refusal = f"{absent[0]} is missing"
    fits, streamed = "", False
    if not refusal:
        refusal = _refused(found, device)
    if not refusal:
        refusal, fits, streamed = _fit(estimate, device, ram, is_own=_is_own(preset))
    steps = int(preset.settings.get("num_inference_steps") or 1)
    passes = steps * (2 if float(preset.settings.get("guidance_scale") or 0) > 0 else 1)
    expands = bool(found.packing) and any(packing.startswith(found.packing) for packing in expanding)
    caveats = [_EXPANDED] if expands else []
    if device.kind == "cpu" and not _is_own(preset):
        caveats.append(_slow_cpu(published_shapes(ctx, preset), passes))
    if dtype == "float16" and device.kind == "cuda" and (device.capability or 0) < BF16_CAPABILITY:
        caveats.append(_FLOAT16)
    return Verdict(
        preset=preset.id,
        name=preset.name,
        format=found.name,
        refusal=refusal,
        reason=fits,
        caveats=tuple(caveats),
        weights=None if estimate is None else _total(estimate),
        to_download=sum(file.to_come for file in files),
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
    estimate: MemoryEstimate | None, device: DeviceInfo, ram: int | None, *, is_own: bool
) -> tuple[str, str, bool]:
    """(why not, how it fits, whether it is streamed)."""
    if estimate is None:
        return "the size of its files is not known", "", False
    total = _total(estimate)
    if device.kind == "cuda":
        weights = {role: size.nbytes for role, size in estimate.sizes.items()}
        profile, reason = automatic_profile(device.total_memory, ram or 0, weights)
        if profile is not None and ram is not None and total > ram:
            return f"{_gib(total)} of weights need more than this machine's {_gib(ram)} of RAM", "", False
        return "", reason, profile is not None and any(profile.resident.values())
    if ram is None or is_own:
        return "", f"{_gib(total)} of weights", False
    needed: float = total + WORKING_MIB * MIB
    room = ram * SHARED_MEMORY_SHARE
    if device.kind == "cpu":  # where weights are mapped, and a text encoder that has read the prompt is let go of
        needed, room = plan_memory(estimate, device, ram=ram).ram_mb * MIB + CPU_MARGIN, ram
    if needed > room:
        return f"takes {_gib(needed)} of RAM, this machine has {_gib(ram)}", "", False
    return "", f"{_gib(total)} of weights in {_gib(ram)} of RAM", False


def _weigh(
    ctx: AppContext, preset: Preset, files: list[PlannedFile], device: DeviceInfo, dtype: str
) -> MemoryEstimate | None:
    """Of one picture by this preset; None where the size of a file is not known."""
    work = Workload(
        width=_SIDE,
        height=_SIDE,
        tile_cells=None,
        compute_bytes=DTYPE_BYTES[dtype],
        vae_bytes=DTYPE_BYTES[VAE_DTYPE],
        decode_bytes=quick_decode_bytes(device, dtype),
        guided=float(preset.settings.get("guidance_scale") or 0) > 0,
        on_cpu=device.kind == "cpu",
    )
    return weigh_files(ctx, preset, files, work)


def _total(estimate: MemoryEstimate) -> int:
    return sum(size.nbytes for size in estimate.sizes.values())


def _is_own(preset: Preset) -> bool:
    """Whether the preset's weights come with the program."""
    return bool(preset.urls) and preset.urls[0].startswith("file:")


def _slow_cpu(shapes: Mapping[str, Mapping[str, int]], passes: int) -> str:
    if "transformer" not in shapes:
        return "slow: a model of this size is made for a GPU"
    operations = 2 * shapes["transformer"]["numbers"] * _TOKENS * passes
    most, least = (operations / speed / 60 for speed in CPU_SPEEDS)
    return f"slow: {least:.0f} to {most:.0f} minutes for a picture of {_SIDE}x{_SIDE} on a CPU, by arithmetic"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"

"""The decision: where weights live and how the picture is decoded, on a GPU or in one memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import util

from shared.app.device import DeviceInfo
from shared.app.memory import BASE_MB, MIB, STAGES, MemoryEstimate
from shared.app.memory_plan.asked import Asked
from shared.app.memory_plan.engines import (
    Outlook,
    StreamedPlan,
    assumed_rates,
    by_mmgp,
    choose_engine,
    direct,
    streamed,
)
from shared.app.memory_plan.relief import Relief
from shared.app.memory_plan.result import Engine, MemoryPlan
from shared.app.offload import GIB, Profile, automatic_profile, find_profile
from shared.quant.errors import UserError

RESERVE_MB = 512.0  # an estimate: the driver's context, workspaces, recorded forwards (< 300), the allocator's waste
LEAST_RESERVE_MB = 256.0  # where weights are streamed, and so no forward is recorded
UPLOAD_MB = 512.0  # page-locked buffers that weights travel through, at most: streamer/bulk.py
TILED_FROM = 0.25  # of the GPU's room: a decode that needs more is done in tiles, which cost little time
PINNED_RAM_SHARE = 0.5  # of the RAM may be page-locked
FREE_RAM_SHARE = 0.8  # of the free RAM a CPU's decode may take in one piece


def plan_memory(
    estimate: MemoryEstimate,
    device: DeviceInfo,
    *,
    ram: int,
    free: int | None = None,
    asked: Asked | None = None,
    relief: Relief | None = None,
    has_mmgp: bool | None = None,
) -> MemoryPlan:
    """Decide where the weights live and how the picture is decoded.

    ram: bytes of RAM. free: bytes that are free on the GPU, or in RAM without one, as far as known. relief: what was
    tried before. has_mmgp: whether it is installed; None looks. Raises UserError for an unknown kind of offload or
    profile, and for a cap that nothing fits into.
    """
    asked, relief = asked or Asked(), relief or Relief()
    profile = asked.known_profile()
    if device.kind != "cuda":
        why = _why_one_memory(device, profile, asked.cap)
        return _on_one_memory(estimate, why, room=ram if free is None else free, relief=relief)
    return _on_gpu(estimate, device, asked, profile, ram=ram, free=free, relief=relief, has_mmgp=has_mmgp)


def _on_gpu(
    estimate: MemoryEstimate,
    device: DeviceInfo,
    asked: Asked,
    profile: Profile | None,
    *,
    ram: int,
    free: int | None,
    relief: Relief,
    has_mmgp: bool | None,
) -> MemoryPlan:
    total = device.total_memory if device.total_memory is not None else 2**62
    have = min(total if free is None else free, total if asked.cap is None else asked.cap)
    tile, decode_mb, why_tiled = _tile(estimate, have / MIB * TILED_FROM, relief, whole_mb=_room_beside(estimate, have))
    working = {**estimate.working_mb, "decode": decode_mb}
    beside = max(working.values()) + estimate.loras_mb
    room = round((have / MIB - beside - RESERVE_MB) * MIB * relief.share)
    stream_plan = StreamedPlan(estimate.sizes, room)
    _check_cap(asked.cap, stream_plan.least + (beside + LEAST_RESERVE_MB) * MIB)

    weights = {name: size.nbytes for name, size in estimate.sizes.items()}
    by_profile = profile or automatic_profile(have, ram, weights)[0] or find_profile(1)
    assert by_profile is not None
    rates = assumed_rates(device.capability)
    outlooks: dict[Engine, Outlook] = {
        "direct": direct(estimate, rates),
        "mmgp": by_mmgp(estimate, rates, by_profile, have),
        "stream": streamed(estimate, rates, stream_plan),
    }
    seconds: dict[str, float] = {name: outlook.step_seconds for name, outlook in outlooks.items()}
    fits = sum(weights.values()) <= room
    if has_mmgp is None:
        has_mmgp = util.find_spec("mmgp") is not None
    peaks_of = {
        name: {stage: held / MIB + estimate.loras_mb + working[stage] for stage, held in _held(estimate, outlook)}
        for name, outlook in outlooks.items()
    }
    engine, why = choose_engine(
        asked.offload, profile, relief, fits=fits, has_mmgp=has_mmgp, seconds=seconds,
        mmgp_fits=max(peaks_of["mmgp"].values()) + LEAST_RESERVE_MB <= have / MIB,
    )  # fmt: skip
    sizes = f"{sum(weights.values()) / GIB:.1f} GiB of weights, room for {max(room, 0) / GIB:.1f} GiB on the GPU"
    return MemoryPlan(
        engine=engine,
        reason=f"{why} ({sizes})",
        profile=by_profile if engine == "mmgp" else None,
        gpu_bytes=have,
        budget=max(room, stream_plan.least),
        lock=round(ram * PINNED_RAM_SHARE),
        cap=asked.cap,
        tile=tile,
        decode_ways=estimate.decode_ways,
        peaks_mb=peaks_of[engine],
        ram_mb=_ram_beside_gpu(estimate, engine),
        vram_mb=max(peaks_of[engine].values()),
        sentences=[outlooks[engine].words, *why_tiled],
        step_seconds=seconds,
    )


def _ram_beside_gpu(estimate: MemoryEstimate, engine: Engine) -> float:
    """MiB of RAM: all weights where they are brought again and again; else they are read once and let go of, and what
    cannot stay in the file counts until it is on the GPU, and the buffers that it travels through.
    """
    sizes = estimate.sizes.values()
    if engine != "direct":
        return BASE_MB + sum(size.nbytes for size in sizes) / MIB
    return BASE_MB + UPLOAD_MB + sum(size.nbytes - size.mapped for size in sizes) / MIB


def _check_cap(cap: int | None, least: float) -> None:
    """Raise UserError for a cap below the least bytes that a picture takes on the GPU."""
    if cap is not None and least > cap:
        raise UserError(
            f"{cap / GIB:.2f} GB on the GPU are too few: with two blocks at a time it takes {least / GIB:.2f} GB.",
            "Raise --max-vram, or take a smaller picture, a packed model or --set VAE_tile_size=16.",
        )


def _on_one_memory(estimate: MemoryEstimate, reason: str, *, room: int, relief: Relief) -> MemoryPlan:
    """Of a CPU, or a GPU that shares its memory: nothing is moved; modules add up in the order in which they run.

    room: bytes that are there for it.
    """
    weights = estimate.weights_mb
    held = sum(size.nbytes - size.mapped for size in estimate.sizes.values())  # what is mapped gives way to the decode
    left = (room - held) / MIB - BASE_MB - estimate.loras_mb
    tile, decode_mb, why_tiled = _tile(estimate, max(left, 0.0) * FREE_RAM_SHARE, relief)
    working = {**estimate.working_mb, "decode": decode_mb}
    peaks, used = {}, BASE_MB
    for stage, module in STAGES.items():
        used += weights[module] + (estimate.loras_mb if stage == "denoise" else 0.0)
        peaks[stage] = used + working[stage]
        if module == "text_encoder":
            used -= estimate.sizes[module].mapped / MIB  # let go of when the prompts are encoded
    return MemoryPlan(
        engine="direct",
        reason=reason,
        cap=None,
        tile=tile,
        decode_ways=estimate.decode_ways,
        peaks_mb=peaks,
        ram_mb=max(peaks.values()),
        vram_mb=0.0,
        sentences=["All weights are used where they are.", *why_tiled],
        step_seconds={},
    )


def unknown_sizes(device: DeviceInfo, asked: Asked) -> tuple[str, str]:
    """The name of a plan, and why, for files that are not all on this machine."""
    profile = asked.known_profile()
    if device.kind != "cuda":
        return "direct", _no_gpu(device)
    if asked.offload in ("stream", "none"):
        return ("stream" if asked.offload == "stream" else "direct"), "asked for"
    if profile is not None:
        return f"profile {profile.number:g}", f"asked for. {profile.sentence}"
    return "auto", "known when all weights are on this machine"


def _why_one_memory(device: DeviceInfo, profile: Profile | None, cap: int | None) -> str:
    """Why nothing is moved, and what was asked for in vain."""
    reason = _no_gpu(device)
    if profile is not None:
        reason += f"; profile {profile.number:g} is for NVIDIA GPUs"
    if cap is not None:
        reason += "; a cap on GPU memory is for NVIDIA GPUs"
    return reason


def _no_gpu(device: DeviceInfo) -> str:
    return "the CPU and the GPU share their memory" if device.kind == "mps" else "there is no GPU to share"


def _room_beside(estimate: MemoryEstimate, have: int) -> float:
    """MiB that a decode may take in one piece: beside a decoder of its own, what is left with all weights in place.

    Bands cost such a decode little time, and weights that had to be moved for it would cost more.
    """
    if not estimate.decodes_beside:
        return math.inf
    return have / MIB - sum(estimate.weights_mb.values()) - estimate.loras_mb - RESERVE_MB


def _held(estimate: MemoryEstimate, outlook: Outlook) -> Iterator[tuple[str, float]]:
    """Bytes of weights on the GPU, by stage."""
    for stage, module in STAGES.items():
        if stage != "decode" or not estimate.decodes_beside:
            yield stage, outlook.held[module]
        elif outlook.stays:
            yield stage, outlook.held[module] - estimate.saved_mb * MIB
        else:
            yield stage, outlook.held["transformer"]  # nobody asks for the VAE, so it is left where it is


def _tile(
    estimate: MemoryEstimate, most_mb: float, relief: Relief, *, whole_mb: float = math.inf
) -> tuple[int, float, list[str]]:
    """(tile, MiB of the decode, why in words): as asked for, or in one piece, or the largest tile within most_mb.

    whole_mb: that a decode in one piece may take at most, too. What was asked for stands until memory ran out with it.
    """
    asked = estimate.tile or 0
    whole = min(most_mb, whole_mb)
    if relief.tile is None and (estimate.tile is not None or estimate.decode_mb <= whole):
        return asked, estimate.decode_mb, []
    tiles = [tile for tile in estimate.decode_ways if relief.tile is None or tile <= relief.tile]
    tile = next((t for t in tiles if estimate.decode_tiled_mb[t] <= most_mb), tiles[-1])
    if relief.tile is None and estimate.decode_tiled_mb[tile] >= estimate.decode_mb:
        return asked, estimate.decode_mb, []  # the picture is no larger than the tile
    gain = f"{estimate.decode_tiled_mb[tile]:,.0f} MiB instead of {estimate.decode_mb:,.0f}"
    return tile, estimate.decode_tiled_mb[tile], [f"The picture is decoded in {estimate.decode_ways[tile]}: {gain}."]

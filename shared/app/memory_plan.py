"""Where weights will live and how the picture will be decoded, from sizes and the room there is: needs no torch.

On an NVIDIA GPU the weights' room is what is free, or the cap that was asked for, less the working memory of the widest
stage and a reserve. In this order:

    direct   everything fits into the room: all of it is put there
    mmgp     a profile (offload.py); the choice as long as the streamer is not predicted to be clearly quicker
    stream   streamer/ with the room as its budget: what fits stays, only the rest is copied for each step

The prediction of a step is stream_schedule.simulate's: the blocks' computing time, from their products and the card's
rate, against the time of their copies. mmgp copies every block of a streamed model for each step. Rates are assumed
(`assumed_rates`), and only their order matters for the choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import util
from typing import Any, Literal

from shared.app.device import DeviceInfo
from shared.app.memory import BASE_MB, MIB, STAGES, TILES, MemoryEstimate, ModuleSizes
from shared.app.offload import GIB, Profile, automatic_profile, budgets_mib, find_profile
from shared.app.stream_schedule import DEPTH, Block, choose_resident, held_bytes, simulate
from shared.quant.errors import UserError

Engine = Literal["direct", "mmgp", "stream"]

OFFLOADS = ("auto", "mmgp", "stream", "none")
"""What can be asked for; "none" puts everything on the GPU."""

RESERVE_MB = 512.0  # an estimate: the driver's context, workspaces, recorded forwards (< 300), the allocator's waste
TILED_FROM = 0.25  # of the GPU's room: a decode that needs more is done in tiles, which cost little time
CLEARLY_QUICKER = 0.9  # the streamer is taken where its step takes at most this share of mmgp's
PINNED_RAM_SHARE = 0.5  # of the RAM may be page-locked
FREE_RAM_SHARE = 0.8  # of the free RAM a CPU's decode may take in one piece

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(k|m|g|t)i?)?b?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second from page-locked RAM to the GPU, and products per second of a plain 16-bit matrix product."""

    copy: float
    products: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Relief:
    """What was tried already when memory ran out, to be kept to from then on.

    tile: decode in tiles of so many latent cells at most. engine: the least that is streamed. share: of the weights'
    room that may be used.
    """

    tile: int | None = None
    engine: Engine | None = None
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What was decided, and the peaks it leads to. peaks_mb: by stage, on the GPU, or on a CPU in RAM.

    gpu_bytes: to be used on the GPU at most. cap: the same if it was asked for, else None. budget: bytes of weights on
    the GPU at once, and lock: of RAM to page-lock, both for the streamer. tile: latent cells, 0 in one piece. profile:
    for "mmgp". step_seconds: predicted for each engine that was weighed.
    """

    engine: Engine
    reason: str
    profile: Profile | None = None
    gpu_bytes: int = 0
    budget: int = 0
    lock: int = 0
    cap: int | None = None
    tile: int = 0
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


def parse_size(text: str | float | None) -> int | None:
    """Bytes of "4GB", "3.5 GiB", "900MB" or "4" (GB); None for nothing and 0. A GB is 2**30 bytes, as cards are sold.

    Raises UserError for anything else.
    """
    words = str(text or "").strip()
    if not words or words == "0":
        return None
    found = _SIZE.fullmatch(words)
    if found is None:
        raise UserError(f"{words!r} is no amount of memory.", "Write it as 4GB, 3.5GB or 900MB.")
    units = {"k": 2**10, "m": MIB, "g": GIB, "t": 2**40}
    return round(float(found[1]) * units[(found[2] or "g").lower()]) or None


def assumed_rates(capability: int | None) -> Rates:
    """Of a typical card of that generation: its bus in practice and its 16-bit tensor cores. Not measured."""
    table = (  # from capability on: GB/s, TF/s / 2 products
        (120, 50e9, 100e12),
        (100, 50e9, 800e12),
        (90, 50e9, 350e12),
        (89, 25e9, 75e12),
        (86, 25e9, 35e12),
        (80, 25e9, 120e12),
        (0, 12e9, 25e12),
    )
    copy, products = next((c, p) for least, c, p in table if (capability or 0) >= least)
    return Rates(copy, products)


def plan_memory(
    estimate: MemoryEstimate,
    device: DeviceInfo,
    *,
    ram: int,
    free: int | None = None,
    cap: int | None = None,
    offload: str = "auto",
    profile: float | None = None,
    relief: Relief | None = None,
    has_mmgp: bool | None = None,
) -> MemoryPlan:
    """Decide where the weights live and how the picture is decoded.

    ram: bytes of RAM. free: bytes that are free on the GPU, or in RAM without one, as far as known. cap: most bytes to
    use on the GPU. offload: one of OFFLOADS. profile: mmgp's number that was asked for; it asks for mmgp. relief: what
    was tried before. Raises UserError for an unknown kind of offload or profile, and for a cap that nothing fits into.
    """
    relief = relief or Relief()
    if offload not in OFFLOADS:
        raise UserError(f"Unknown kind of offload {offload!r}.", f"Choose from: {', '.join(OFFLOADS)}.")
    chosen = find_profile(profile)
    if device.kind != "cuda":
        return _on_one_memory(estimate, device, chosen, ram=ram, free=free, cap=cap, relief=relief)
    total = device.total_memory if device.total_memory is not None else 2**62
    have = min(total if free is None else free, total if cap is None else cap)
    tile, decode_mb, why_tiled = _tile(estimate, have / MIB * TILED_FROM, relief)
    working = {**estimate.working_mb, "decode": decode_mb}
    room = round((have / MIB - max(working.values()) - estimate.loras_mb - RESERVE_MB) * MIB * relief.share)
    weights = {name: size.nbytes for name, size in estimate.sizes.items()}
    if has_mmgp is None:
        has_mmgp = util.find_spec("mmgp") is not None
    rates = assumed_rates(device.capability)
    drawn = estimate.sizes["transformer"]

    streamed = _StreamedPlan(estimate.sizes, room, cap)
    least = streamed.least + max(working.values()) * MIB + (estimate.loras_mb + RESERVE_MB) * MIB
    if cap is not None and least > cap:
        raise UserError(
            f"{cap / GIB:.2f} GB on the GPU are too few: with two blocks at a time it takes {least / GIB:.2f} GB.",
            "Raise --max-vram, or take a smaller picture, a packed model or --set VAE_tile_size=16.",
        )
    by_profile = chosen or automatic_profile(have, ram, weights)[0] or find_profile(1)
    assert by_profile is not None
    budgets = budgets_mib(by_profile, weights, have)
    seconds = {
        "direct": _step_seconds(drawn, (True,) * len(drawn.blocks), estimate.tokens, rates),
        "mmgp": _step_seconds(drawn, _mmgp_resident(drawn, budgets["transformer"]), estimate.tokens, rates),
        "stream": _step_seconds(drawn, streamed.resident("transformer"), estimate.tokens, rates),
    }
    fits = sum(weights.values()) <= room
    engine, reason = _engine(offload, chosen, relief, fits=fits, has_mmgp=has_mmgp, seconds=seconds)
    sizes = f"{sum(weights.values()) / GIB:.1f} GiB of weights, room for {max(room, 0) / GIB:.1f} GiB on the GPU"
    reason = f"{reason} ({sizes})"
    held = {
        "direct": dict.fromkeys(weights, float(sum(weights.values()))),
        "mmgp": {name: _mmgp_held(estimate.sizes[name], budget) for name, budget in budgets.items()},
        "stream": {name: float(streamed.held(name)) for name in weights},
    }[engine]
    peaks = {stage: held[m] / MIB + estimate.loras_mb + working[stage] for stage, m in STAGES.items()}
    sentences = [
        {
            "direct": "All weights stay on the GPU.",
            "mmgp": f"mmgp moves the weights, profile {by_profile.number:g}. {by_profile.sentence}",
            "stream": f"Weights are streamed: {streamed.words()}.",
        }[engine],
        *why_tiled,
    ]
    return MemoryPlan(
        engine=engine,
        reason=reason,
        profile=by_profile if engine == "mmgp" else None,
        gpu_bytes=have,
        budget=max(room, streamed.least),
        lock=round(ram * PINNED_RAM_SHARE),
        cap=cap,
        tile=tile,
        peaks_mb=peaks,
        ram_mb=BASE_MB + sum(weights.values()) / MIB,
        vram_mb=max(peaks.values()),
        sentences=sentences,
        step_seconds=seconds,
    )


def _on_one_memory(
    estimate: MemoryEstimate,
    device: DeviceInfo,
    profile: Profile | None,
    *,
    ram: int,
    free: int | None,
    cap: int | None,
    relief: Relief,
) -> MemoryPlan:
    """Of a CPU, or a GPU that shares its memory: nothing is moved; modules add up in the order in which they run."""
    reason = _no_gpu(device)
    if profile is not None:
        reason += f"; profile {profile.number:g} is for NVIDIA GPUs"
    if cap is not None:
        reason += "; a cap on GPU memory is for NVIDIA GPUs"
    weights = estimate.weights_mb
    held = sum(size.nbytes - size.mapped for size in estimate.sizes.values())  # what is mapped gives way to the decode
    left = ((ram if free is None else free) - held) / MIB - BASE_MB - estimate.loras_mb
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
        peaks_mb=peaks,
        ram_mb=max(peaks.values()),
        vram_mb=0.0,
        sentences=["All weights are used where they are.", *why_tiled],
        step_seconds={},
    )


def unknown_sizes(device: DeviceInfo, offload: str, profile: float | None) -> tuple[str, str]:
    """The name of a plan, and why, for files that are not all on this machine."""
    if offload not in OFFLOADS:
        raise UserError(f"Unknown kind of offload {offload!r}.", f"Choose from: {', '.join(OFFLOADS)}.")
    chosen = find_profile(profile)
    if device.kind != "cuda":
        return "direct", _no_gpu(device)
    if offload in ("stream", "none"):
        return ("stream" if offload == "stream" else "direct"), "asked for"
    if chosen is not None:
        return f"profile {chosen.number:g}", f"asked for. {chosen.sentence}"
    return "auto", "known when all weights are on this machine"


def _no_gpu(device: DeviceInfo) -> str:
    return "the CPU and the GPU share their memory" if device.kind == "mps" else "there is no GPU to share"


def next_relief(relief: Relief, stage: str, plan: MemoryPlan, device: DeviceInfo) -> tuple[Relief, str] | None:
    """What to try after memory ran out in `stage` under `plan`, and in words; None when nothing is left.

    A decode is first done in smaller tiles. Then weights are streamed instead of resident, then with half of their
    room, then two blocks at a time.
    """
    if stage == "decode":
        smaller = [tile for tile in TILES if not plan.tile or tile < plan.tile]
        if smaller:
            return replace(relief, tile=smaller[0]), f"the picture is decoded in tiles of {smaller[0]} latent cells"
    if device.kind != "cuda":
        return None
    if plan.engine != "stream":
        return replace(relief, engine="stream"), "weights are streamed through the GPU block by block"
    if relief.share > 0.5:
        return replace(relief, engine="stream", share=0.5), "half as many weights stay on the GPU"
    if relief.share > 0:
        return replace(relief, engine="stream", share=0.0), "only two blocks at a time are on the GPU"
    return None


def _size(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def _engine(
    offload: str,
    profile: Profile | None,
    relief: Relief,
    *,
    fits: bool,
    has_mmgp: bool,
    seconds: Mapping[str, float],
) -> tuple[Engine, str]:
    if relief.engine == "stream":
        return "stream", "the GPU ran out of memory with more of the weights on it"
    if offload == "stream":
        return "stream", "asked for"
    if offload == "none":
        return "direct", "asked for"
    if offload == "mmgp" or (profile is not None and offload == "auto"):
        if has_mmgp:
            return "mmgp", "asked for"
        return "stream", "mmgp, which was asked for, is not installed"
    if fits:
        return "direct", "everything fits on the GPU"
    if not has_mmgp:
        return "stream", "not everything fits on the GPU at once, and mmgp is not installed"
    if seconds["stream"] <= CLEARLY_QUICKER * seconds["mmgp"]:
        words = f"a step is predicted to take {seconds['stream']:.2g} s, with mmgp {seconds['mmgp']:.2g} s"
        return "stream", f"not everything fits on the GPU at once; {words}"
    return "mmgp", "not everything fits on the GPU at once"


def _tile(estimate: MemoryEstimate, most_mb: float, relief: Relief) -> tuple[int, float, list[str]]:
    """(tile, MiB of the decode, why in words): as asked for, or in one piece, or the largest tile within most_mb.

    What was asked for stands until memory ran out with it.
    """
    asked = estimate.tile or 0
    if relief.tile is None and (estimate.tile is not None or estimate.decode_mb <= most_mb):
        return asked, estimate.decode_mb, []
    tiles = [tile for tile in TILES if tile <= (relief.tile or TILES[0])]
    tile = next((t for t in tiles if estimate.decode_tiled_mb[t] <= most_mb), tiles[-1])
    if relief.tile is None and estimate.decode_tiled_mb[tile] >= estimate.decode_mb:
        return asked, estimate.decode_mb, []  # the picture is no larger than the tile
    gain = f"{estimate.decode_tiled_mb[tile]:,.0f} MiB instead of {estimate.decode_mb:,.0f}"
    return tile, estimate.decode_tiled_mb[tile], [f"The picture is decoded in tiles of {tile} latent cells: {gain}."]


class _StreamedPlan:
    """What the streamer will do with these modules and room, as far as headers tell."""

    def __init__(self, sizes: Mapping[str, ModuleSizes], room: int, cap: int | None) -> None:
        self._sizes = sizes
        blocks = {name: size.blocks or (size.nbytes,) for name, size in sizes.items()}
        self._trunks = {name: size.trunk if size.blocks else 0 for name, size in sizes.items()}
        self.least = max(
            self._trunks[name] + held_bytes(b, (False,) * len(b), depth=min(DEPTH, len(b)))
            for name, b in blocks.items()
        )
        room = max(room, self.least)
        self._stays = {name: choose_resident(b, room - self._trunks[name]) for name, b in blocks.items()}
        self._blocks = blocks

    def resident(self, name: str) -> tuple[bool, ...]:
        return self._stays[name]

    def held(self, name: str) -> int:
        return self._trunks[name] + held_bytes(self._blocks[name], self._stays[name])

    def words(self) -> str:
        parts = []
        for name, stays in self._stays.items():
            whole = all(stays)
            parts.append(
                f"{name} whole in its turn" if whole else f"{name} with {sum(stays)} of {len(stays)} blocks kept"
            )
        return ", ".join(parts).replace("text_encoder", "text encoder").replace("vae", "VAE")


def _step_seconds(size: ModuleSizes, resident: Sequence[bool], tokens: int, rates: Rates) -> float:
    blocks = size.blocks or (size.nbytes,)
    each = tokens * size.products / rates.products / len(blocks)
    stays = resident if len(resident) == len(blocks) else (True,) * len(blocks)
    return simulate([Block(n, each, s) for n, s in zip(blocks, stays, strict=True)], rates.copy)[-1].seconds


def _mmgp_resident(size: ModuleSizes, budget_mib: int) -> tuple[bool, ...]:
    """mmgp streams every block of a model that has a budget below its size."""
    whole = not budget_mib or size.nbytes <= budget_mib * MIB
    return (whole,) * len(size.blocks)


def _mmgp_held(size: ModuleSizes, budget_mib: int) -> float:
    """Bytes on the GPU: the whole module, or the budget, which is never less than the trunk and two blocks."""
    if not budget_mib:
        return float(size.nbytes)
    least = size.trunk + DEPTH * max(size.blocks, default=0)
    return float(min(size.nbytes, max(budget_mib * MIB, least)))

"""What each way of moving weights would do: what it holds on the GPU, and how long a step would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.app.memory import MIB, MemoryEstimate, ModuleSizes
from shared.app.memory_plan.relief import Relief
from shared.app.memory_plan.result import Engine
from shared.app.offload import Profile, budgets_mib
from shared.app.stream_schedule import DEPTH, HOST_TABLE_BYTES, Block, choose_resident, held_bytes, simulate

CLEARLY_QUICKER = 0.9  # the streamer is taken where its step takes at most this share of mmgp's


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second from page-locked RAM to the GPU, and products per second of a plain 16-bit matrix product."""

    copy: float
    products: float


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


@dataclass(frozen=True, slots=True)
class Outlook:
    """What one engine would do.

    step_seconds: predicted. held: bytes of weights on the GPU, by module, while it works. words: in one sentence.
    stays: whether they are all there all the time.
    """

    step_seconds: float
    held: Mapping[str, float]
    words: str
    stays: bool = False


def direct(estimate: MemoryEstimate, rates: Rates) -> Outlook:
    """All weights on the GPU all the time."""
    drawn = estimate.sizes["transformer"]
    total = float(sum(size.nbytes for size in estimate.sizes.values()))
    seconds = _step_seconds(drawn, (True,) * len(drawn.blocks), estimate.tokens, rates)
    return Outlook(seconds, dict.fromkeys(estimate.sizes, total), "All weights stay on the GPU.", stays=True)


def by_mmgp(estimate: MemoryEstimate, rates: Rates, profile: Profile, gpu_bytes: int) -> Outlook:
    """mmgp with one of its profiles."""
    budgets = budgets_mib(profile, {name: size.nbytes for name, size in estimate.sizes.items()}, gpu_bytes)
    drawn = estimate.sizes["transformer"]
    return Outlook(
        _step_seconds(drawn, _mmgp_resident(drawn, budgets["transformer"]), estimate.tokens, rates),
        {name: _mmgp_held(estimate.sizes[name], budget) for name, budget in budgets.items()},
        f"mmgp moves the weights, profile {profile.number:g}. {profile.sentence}",
    )


def streamed(estimate: MemoryEstimate, rates: Rates, plan: StreamedPlan) -> Outlook:
    """Our streamer, as far as `plan` tells."""
    seconds = _step_seconds(estimate.sizes["transformer"], plan.resident("transformer"), estimate.tokens, rates)
    held = {name: float(plan.held(name)) for name in estimate.sizes}
    return Outlook(seconds, held, f"Weights are streamed: {plan.words()}.")


def choose_engine(
    offload: str,
    profile: Profile | None,
    relief: Relief,
    *,
    fits: bool,
    mmgp_fits: bool,
    has_mmgp: bool,
    seconds: Mapping[str, float],
) -> tuple[Engine, str]:
    """The engine, and why: as memory's end or the user left it, else by what fits and the seconds a step would take.

    fits: all weights, on the GPU. mmgp_fits: what mmgp keeps there.
    """
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
    if not mmgp_fits:
        return "stream", "not everything fits on the GPU at once, and mmgp would keep too much there"
    if seconds["stream"] <= CLEARLY_QUICKER * seconds["mmgp"]:
        words = f"a step is predicted to take {seconds['stream']:.2g} s, with mmgp {seconds['mmgp']:.2g} s"
        return "stream", f"not everything fits on the GPU at once; {words}"
    return "mmgp", "not everything fits on the GPU at once"


class StreamedPlan:
    """What the streamer will do with these modules and room, as far as headers tell."""

    def __init__(self, sizes: Mapping[str, ModuleSizes], room: int) -> None:
        blocks = {name: size.blocks or (size.nbytes,) for name, size in sizes.items()}
        trunks = {n: max(0, size.trunk - _table_in_ram(size)) if size.blocks else 0 for n, size in sizes.items()}
        self.least = max(
            trunks[name] + held_bytes(b, (False,) * len(b), depth=min(DEPTH, len(b))) for name, b in blocks.items()
        )
        room = max(room, self.least)
        self._trunks = {name: trunks[name] + (_table_in_ram(s) if s.nbytes <= room else 0) for name, s in sizes.items()}
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


def _table_in_ram(size: ModuleSizes) -> int:
    """Bytes of the embedding table of a module that does not fit, whose few rows are looked up in RAM."""
    return size.table if size.table >= HOST_TABLE_BYTES else 0


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

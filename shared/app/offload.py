"""Where a model's weights live while it runs: all on one device, or streamed through a small GPU.

An Offloader takes the named modules that a handler loaded ("transformer", "text_encoder", "vae") and sees to it that
each is on the compute device when it runs. The rest of the program only ever sees `offloader.device`. There are three:
DirectPlacement here, mmgp's profiles (mmgp_engine.py), and our own streamer/; memory_plan/ chooses.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from shared.app.device import DeviceInfo, ram_bytes
from shared.quant.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from shared.app.memory_plan import MemoryPlan
    from shared.app.streamer import Lane

logger = logging.getLogger(__name__)

MIB = 2**20
GIB = 2**30

# Kept free for activations: one 1024x1024 picture decoded in one piece. An estimate, see docs/offload.md.
WORKING_MIB = 3072

# mmgp puts at most this share of a GPU's memory into weights.
WEIGHTS_SHARE = 0.8

# quanto's int8 products on a CPU crash the process, without an exception, unless the weights start at such an address:
# torch._weight_int8pack_mm, torch 2.13. Tensors mapped from a safetensors file start anywhere. What multiplies our own
# PackedLinear takes any address, and a copy of those would be the whole model.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One way to share a small GPU: Wan2GP's numbers, in words and in figures.

    resident: MiB of a model's weights kept on the GPU while it runs, by module name, "*" for the others; the rest is
        streamed through block by block. 0 keeps the whole model there. Figures of the streaming profiles: Wan2GP,
        wgp.py at 8681e9f7; 100 is less than any model needs, so it means "as little as possible".
    pinned: which models stay in page-locked RAM, from where a GPU reads about twice as fast; a copy that cannot be
        swapped out, at most half of the RAM.
    prefetch: whether the next block travels while the present one computes.
    """

    number: float
    sentence: str
    resident: Mapping[str, int]
    pinned: Literal["all", "transformer", "none"]
    prefetch: bool = True


_WHOLE = {"*": 0}
_STREAMED = {"transformer": 100, "text_encoder": 100, "*": 3000}

PROFILES: Mapping[float, Profile] = {
    profile.number: profile
    for profile in (
        Profile(
            number=1,
            sentence="Large card, much RAM: each model whole on the card in its turn, all of them in fast RAM.",
            resident=_WHOLE,
            pinned="all",
        ),
        Profile(
            number=2,
            sentence="Small card, much RAM: a few layers at a time on the card, all models in fast RAM.",
            resident=_STREAMED,
            pinned="all",
        ),
        Profile(
            number=3,
            sentence="Large card, less RAM: each model whole on the card in its turn, the transformer in fast RAM.",
            resident=_WHOLE,
            pinned="transformer",
        ),
        Profile(
            number=3.5,
            sentence="Large card, little RAM: as 3, but nothing is held in fast RAM.",
            resident=_WHOLE,
            pinned="none",
        ),
        Profile(
            number=4,
            sentence="Small card, less RAM: a few layers at a time on the card, the transformer in fast RAM.",
            resident=_STREAMED,
            pinned="transformer",
        ),
        Profile(
            number=4.5,
            sentence="Very small card: as 4, but no layer is fetched ahead, which saves its memory and costs time.",
            resident=_STREAMED,
            pinned="transformer",
            prefetch=False,
        ),
        Profile(
            number=5,
            sentence="Small card, little RAM: as 4, but nothing is held in fast RAM. The slowest.",
            resident={**_STREAMED, "*": 1000},
            pinned="none",
        ),
    )
}


class Offloader(Protocol):
    """Sees to it that every module is on the compute device when it runs."""

    name: str

    @property
    def device(self) -> torch.device:
        """Where inputs must be put and results appear."""

    def place(self, modules: Mapping[str, nn.Module]) -> None:
        """Take charge of modules, which are on the CPU and keep their number types. Once, until release()."""

    def release(self) -> None:
        """Undo place(): the device holds nothing of the modules any more; those still in use are on the CPU, whole.

        Let go of a model before, and what only this object still holds is dropped without being copied back.
        """

    def describe(self) -> str:
        """One line for people."""


class DirectPlacement:
    """Every module on one device at once: the CPU, or a GPU that has room for all.

    lane: makes what copies to the device; None leaves the copying to torch.
    """

    name = "direct"

    def __init__(self, device: torch.device | str, lane: Callable[[], Lane] | None = None) -> None:
        import torch

        self._device = torch.device(device)
        self._make_lane = lane
        # Weak: a module that nobody uses any more at release() need not travel back to the CPU.
        self._modules: list[weakref.ref[nn.Module]] | None = None
        self._bytes = 0

    @property
    def device(self) -> torch.device:
        return self._device

    def place(self, modules: Mapping[str, nn.Module]) -> None:
        if self._modules is not None:
            raise RuntimeError("place() was called twice; call release() first")
        self._modules = [weakref.ref(module) for module in modules.values()]
        for module in modules.values():
            module.eval().requires_grad_(False)
            if self._device.type == "cpu":
                align_integer_weights(module)
            elif self._make_lane is None:
                module.to(self._device)
        if self._make_lane is not None:
            self._upload(modules.values(), self._make_lane())
        self._bytes = sum(weight_bytes(module) for module in modules.values())

    @staticmethod
    def _upload(modules: Iterable[nn.Module], lane: Lane) -> None:
        from shared.app.streamer.bulk import upload_all

        try:
            upload_all(modules, lane)
        finally:
            lane.close()

    def release(self) -> None:
        import torch

        modules, self._modules, self._bytes = self._modules or [], None, 0
        gc.collect()
        for reference in modules:
            module = reference()
            if module is not None:
                module.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._device.type == "mps":
            torch.mps.empty_cache()

    def describe(self) -> str:
        where = "in RAM" if self._device.type == "cpu" else "on the GPU"
        size = f" ({self._bytes / GIB:.2f} GiB)" if self._modules is not None else ""
        return f"all weights {where}{size}"


def make_offloader(device: DeviceInfo, plan: MemoryPlan | None, profile: float | None = None) -> Offloader:
    """The offloader that a plan asks for.

    plan: None where sizes are not known; an NVIDIA GPU then gets mmgp with `profile`, or profile 4. A missing or broken
    mmgp is no error: weights are streamed without it, and a warning says so. A cap of the plan holds for the whole
    process: beyond it torch finds no memory.
    Raises UserError for a number that is not in PROFILES.
    """
    if device.kind != "cuda":
        return DirectPlacement(device.kind)
    if plan is not None and plan.cap is not None and device.total_memory:
        import torch

        torch.cuda.set_per_process_memory_fraction(min(1.0, plan.cap / device.total_memory))
    if plan is not None and plan.engine == "direct":
        from shared.app.streamer import CudaLane

        return DirectPlacement("cuda", CudaLane)
    budget = plan.budget if plan is not None else round(WEIGHTS_SHARE * (device.total_memory or 0) / 2)
    lock = plan.lock if plan is not None else ram_bytes() // 2
    if plan is None or plan.engine == "mmgp":
        chosen = (plan.profile if plan is not None else find_profile(profile)) or PROFILES[4]
        try:
            from shared.app.mmgp_engine import MmgpOffload
        # A package that does not fit its neighbours fails in any of these ways while it is imported.
        except (ImportError, OSError, AttributeError, RuntimeError, TypeError) as error:
            logger.warning("mmgp does not load here (%s); weights are streamed without it", error)
        else:
            return MmgpOffload(chosen, total_memory=plan.gpu_bytes if plan is not None else device.total_memory)
    from shared.app.streamer import StreamOffload

    return StreamOffload(budget=budget, lock=lock)


def find_profile(number: float | None) -> Profile | None:
    """The profile of that number; None for None, 0 and -1, which leave the choice to the program."""
    if number is None or number in (0, -1):
        return None
    try:
        return PROFILES[number]
    except KeyError:
        known = ", ".join(f"{n:g}" for n in PROFILES)
        raise UserError(f"There is no profile {number:g}.", f"Choose from {known}, or -1 for automatic.") from None


def automatic_profile(
    total_memory: int | None, ram: int, weights: Mapping[str, int] | None
) -> tuple[Profile | None, str]:
    """The profile for a GPU of `total_memory` bytes, and why; None: everything fits on the GPU at once.

    As fast as the sizes allow: all weights resident, else one whole model at a time, else streamed; and as much in
    page-locked RAM as half of the RAM holds, which is mmgp's limit.
    """
    if weights is None or total_memory is None:
        return PROFILES[4], "sizes are not known yet, and profile 4 works on most machines"
    room = min(WEIGHTS_SHARE * total_memory, total_memory - WORKING_MIB * MIB)
    everything, largest = sum(weights.values()), max(weights.values(), default=0)
    gpu, ram_size = f"{total_memory / GIB:.1f} GiB on the GPU", f"{ram / GIB:.0f} GiB of RAM"
    sizes = f"{everything / GIB:.1f} GiB of weights, {gpu}, {ram_size}"
    if everything <= room:
        return None, f"everything fits on the GPU ({sizes})"
    pinned = _pinnable(weights, everything, ram)
    if largest <= room:
        number = {"all": 1.0, "transformer": 3.0, "none": 3.5}[pinned]
        return PROFILES[number], f"each model fits on the GPU, but not all at once ({sizes})"
    number = {"all": 2.0, "transformer": 4.0, "none": 5.0}[pinned]
    return PROFILES[number], f"the largest model does not fit on the GPU ({sizes})"


def _pinnable(weights: Mapping[str, int], everything: int, ram: int) -> Literal["all", "transformer", "none"]:
    if everything <= ram // 2:
        return "all"
    return "transformer" if weights.get("transformer", everything) <= ram // 2 else "none"


def budgets_mib(profile: Profile, weights: Mapping[str, int], total_memory: int | None) -> dict[str, int]:
    """MiB of each module's weights to keep on the GPU while it runs; 0 is the whole module, without limit.

    weights: bytes by module name. A whole module that leaves too little room on a GPU of `total_memory` bytes gets a
    limit after all, so that it is streamed instead of running out of memory.
    """
    budgets = {}
    for name, size in weights.items():
        budget = profile.resident.get(name, profile.resident["*"])
        if total_memory is not None:
            memory = total_memory // MIB
            # On a GPU smaller than the working memory itself, a quarter is still tried; never 0, which means "whole".
            limit = max(1, int(min(WEIGHTS_SHARE * memory, max(memory - WORKING_MIB, memory // 4))))
            if min(budget or size // MIB, size // MIB) > limit:
                budget = limit
        budgets[name] = budget
    return budgets


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each counted once, packed ones at their packed size."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(part.nbytes for tensor in tensors for _, _, part in _fields(None, "", tensor))


def align_integer_weights(module: nn.Module) -> int:
    """Copy int8 and uint8 weights that do not start at a 16-byte address, but PackedLinear's; returns how many.

    Needed before computing on a CPU (see ALIGNMENT). Values do not change. Looks into quantised tensors of
    optimum-quanto and others that are made of plain ones.
    """
    import torch

    from shared.quant.linear import PackedLinear

    copied = 0
    for owner in (owner for owner in module.modules() if not isinstance(owner, PackedLinear)):
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            for holder, field, part in _fields(owner, name, tensor):
                if part.dtype in (torch.int8, torch.uint8) and part.data_ptr() % ALIGNMENT:
                    if isinstance(part, torch.nn.Parameter):
                        part.data = part.data.clone()
                    else:
                        setattr(holder, field, part.clone())
                    copied += 1
    return copied


def _fields(owner: object, name: str, tensor: Tensor) -> Iterable[tuple[object, str, Tensor]]:
    """The plain tensors behind an attribute, each with the object and attribute that hold it."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield owner, name, tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for inner in names:
        yield from _fields(tensor, inner, getattr(tensor, inner))

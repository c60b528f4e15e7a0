"""Samplers: how a picture's latents walk from noise (sigma 1) to data (sigma 0). One file each, registered by name.

All work on the rectified flow x(sigma) = (1 - sigma) x0 + sigma noise. A network's velocity v = noise - x0 tells both
ends of the line: x0 = x - sigma v and noise = x + (1 - sigma) v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    # (latents, sigma) -> velocity, all (B, C, h, w) float32. The unified sampler passes a third: the sigma it is for.
    Predict = Callable[..., Tensor]
    # () -> fresh standard noise, shaped as the latents; each picture of a batch has a sequence of its own
    Draw = Callable[[], Tensor]


class Sampler(Protocol):
    """What a sampler file defines at its top level."""

    def schedule(self, steps: int, shift: float) -> list[float]:
        """Its usual sigmas: steps + 1 values falling to 0."""

    def sample(self, predict: Predict, latents: Tensor, sigmas: Sequence[float], draw: Draw) -> Iterator[Tensor]:
        """Yield the latents (B, C, h, w) after each of len(sigmas) - 1 steps; the last are the result.

        draw: called by stochastic samplers only. Sigmas may come from any schedule that falls to 0.
        """


@dataclass(frozen=True, slots=True)
class _Entry:
    module: str
    label: str
    calls_per_step: int = 1  # the last step, to sigma 0, needs one in any case
    fixed_steps: int | None = None


# Name in presets, settings and on the command line -> sampler. "default" and the unified names are Wan2GP's.
_ENTRIES = {
    "default": _Entry("flow_euler", "Euler (default)"),
    "euler": _Entry("flow_euler", "Euler"),
    "heun": _Entry("heun", "Heun, two forwards a step", calls_per_step=2),
    "dpmpp_2m": _Entry("dpmpp_2m", "DPM++ 2M"),
    "res_multistep": _Entry("res_multistep", "RES multistep"),
    "er_sde": _Entry("er_sde", "ER-SDE, fresh noise each step"),
    "lcm": _Entry("lcm", "LCM, fresh noise each step"),
    "unified": _Entry("unified", "TwinFlow unified (default)"),
    "unified_2s": _Entry("unified", "TwinFlow unified, 2 steps", fixed_steps=2),
    "unified_4s": _Entry("unified", "TwinFlow unified, 4 steps", fixed_steps=4),
    "twinflow": _Entry("unified", "TwinFlow unified"),
}
UNIFIED = "unified"


def names() -> tuple[str, ...]:
    return tuple(_ENTRIES)


def choices(*, unified: bool = False) -> list[tuple[str, str]]:
    """(label, name) pairs for a person to choose from, the model's own first.

    unified: for TwinFlow's weights, whose own is the unified sampler; others are not offered it.
    """
    own = [(entry.label, name) for name, entry in _ENTRIES.items() if entry.module == UNIFIED and name != "twinflow"]
    plain = [(entry.label, name) for name, entry in _ENTRIES.items() if entry.module != UNIFIED]
    return [*own, *plain[1:]] if unified else [plain[0], *plain[2:]]


def get(name: str) -> Sampler:
    """The sampler of that name; an empty name is the default. Raises KeyError for unknown ones."""
    return import_module(f"{__name__}.{_ENTRIES[name or 'default'].module}")  # type: ignore[return-value]


def steps_of(name: str, steps: int) -> int:
    """The steps that the sampler takes when `steps` are asked for: most take them, some names say their own."""
    return _ENTRIES[name or "default"].fixed_steps or steps


def forwards(name: str, steps: int) -> int:
    """Calls of the network in that many steps, without guidance."""
    return _ENTRIES[name or "default"].calls_per_step * (steps - 1) + 1


def is_unified(name: str) -> bool:
    """Whether it is the sampler of TwinFlow's weights, which have to be told what sigma a step is for."""
    return _ENTRIES[name or "default"].module == UNIFIED

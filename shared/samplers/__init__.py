"""Samplers: how a picture's latents walk from noise (sigma 1) to data (sigma 0). One file each, registered by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    # (latents, sigma) -> velocity, all (B, C, h, w) float32; velocity = noise - x0
    Predict = Callable[[Tensor, float], Tensor]


class Sampler(Protocol):
    """What a sampler file defines at its top level."""

    def schedule(self, steps: int, shift: float) -> list[float]:
        """Sigmas of a run: steps + 1 values falling from 1 to 0. One step is one call of the network."""

    def sample(self, predict: Predict, latents: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
        """Yield the latents after each step; the last are the result."""


# Name in presets, settings and on the command line -> module here. "default" is what Wan2GP's records say.
_MODULES = {"default": "flow_euler", "euler": "flow_euler"}


def names() -> tuple[str, ...]:
    return tuple(_MODULES)


def get(name: str) -> Sampler:
    """The sampler of that name; an empty name is the default. Raises KeyError for unknown ones."""
    return import_module(f"{__name__}.{_MODULES[name or 'default']}")  # type: ignore[return-value]

"""Step caching: a step's answer is given again where little has changed since it was computed. LOSSY: another picture.

On a straight path from noise to picture the velocity is the same everywhere, and one forward would do. Real paths bend;
where they bend little, the last answer serves once more. How far it is off is foretold from the last two computed ones:

    rate   = |v1 - v0| / |x1 - x0|      how quickly the velocity v changes along the path of latents x
    error  = rate * |x - x1| / |v1|     how much it has changed since, as a share

where |.| is the mean absolute number. Below the threshold no forward is run. So the first two steps of a run are always
computed, error grows with each step that is left out, and a sampler that adds fresh noise goes so far in a step that
nothing is left out. Telling the error takes one number from the device at each step.

After EasyCache (arXiv 2507.02860), which adds up the changes from step to step and keeps v - x, made for other paths.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import Tensor


class _Answer(NamedTuple):
    latents: Tensor
    velocity: Tensor
    forwards: int  # that it took


class StepCache:
    """The answers of one run. saved: forwards that were not run. state: what else the answers depend on, asked anew."""

    def __init__(self, threshold: float, state: Callable[[], Hashable] = tuple) -> None:
        """threshold: the error up to which an answer is used again, a share of the velocity; above 0."""
        self.saved = 0
        self._threshold, self._state = threshold, state
        self.forget()

    def forget(self) -> None:
        """What was computed says nothing about what is computed from now on."""
        self._kind: Hashable = None
        self._last: _Answer | None = None
        self._rate: float | None = None  # None until two answers have been computed

    def find(self, latents: Tensor, kind: Hashable) -> Tensor | None:
        """The velocity to be used again for latents (B, C, h, w); None where it has to be computed.

        kind: what the question is besides latents and their noise level: prompt, guidance, control.
        """
        if self._last is None or self._rate is None or (kind, self._state()) != self._kind:
            return None
        last = self._last
        error = self._rate * _size(latents - last.latents) / _size(last.velocity)
        if not float(error) < self._threshold:  # NaN is not
            return None
        self.saved += last.forwards
        return last.velocity.clone()

    def keep(self, latents: Tensor, velocity: Tensor, kind: Hashable, forwards: int) -> None:
        """Remember what was computed for these latents by so many forwards."""
        kind = (kind, self._state())
        last = self._last if kind == self._kind else None
        self._rate = None
        if last is not None:
            way = float(_size(latents - last.latents))
            self._rate = float(_size(velocity - last.velocity)) / way if way else None
        self._kind, self._last = kind, _Answer(latents.clone(), velocity.clone(), forwards)


def _size(values: Tensor) -> Tensor:
    return values.abs().mean()

"""The velocity a sampler asks for: prompt, guidance and control put to the network, and every forward counted."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.z_image.guidance import ClassifierFreeGuidance
from models.z_image.transformer import Captions, ZImageTransformer

if TYPE_CHECKING:
    from models.z_image.conditions import Constrain, Signals
    from models.z_image.control import ControlSignal


class Predictor:
    """Answers predict(latents, sigma) for one generation. `forwards`: calls of the network per picture so far."""

    def __init__(
        self,
        transformer: ZImageTransformer,
        guidance: ClassifierFreeGuidance,
        positive: Captions,
        both: Captions | None,
        *,
        sigmas: Sequence[float],
        signals: Signals | None = None,
        constrain: Constrain | None = None,
    ) -> None:
        """positive: one caption per picture; both: those and the negative ones behind them.

        sigmas: the schedule that is run, which tells how far a sigma is.
        """
        self.forwards = 0
        self._transformer, self._guidance = transformer, guidance
        self._positive, self._both = positive, both
        self._rising = [-sigma for sigma in sigmas]  # bisect wants a rising list
        self._signals, self._constrain = signals, constrain

    def __call__(self, latents: Tensor, sigma: float) -> Tensor:
        """The velocity noise - x0, (B, C, h, w) float32, of latents at `sigma`."""
        velocity = self._guided(latents, sigma)
        return velocity if self._constrain is None else self._constrain(latents, velocity, sigma)

    def _guided(self, latents: Tensor, sigma: float) -> Tensor:
        signal = None if self._signals is None else self._signals(self._progress(sigma))
        if self._both is None or not self._guidance.active(sigma):
            self.forwards += 1
            return -self._ask(latents, sigma, self._positive, signal)
        self.forwards += 2
        answers = self._ask(latents.repeat(2, 1, 1, 1), sigma, self._both, signal)
        return -self._guidance.combine(*answers.chunk(2))

    def _ask(self, latents: Tensor, sigma: float, captions: Captions, signal: ControlSignal | None) -> Tensor:
        # The network's time runs from 0 (noise) to 1 (data).
        t = torch.full((len(latents),), 1 - sigma, dtype=torch.float32, device=latents.device)
        return self._transformer(latents, t, captions, signal)

    def _progress(self, sigma: float) -> float:
        """The share of the steps that are done where the schedule stands at `sigma`."""
        return min(bisect_left(self._rising, -sigma) / (len(self._rising) - 1), 1.0)

"""The velocity a sampler asks for: prompt, guidance and control put to the network, and every forward counted."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.z_image.guidance import ClassifierFreeGuidance, NormalizedAttentionGuidance
from models.z_image.modulation import Moment, Timetable
from models.z_image.transformer import Captions, Nag, ZImageTransformer
from shared.ops.upload import upload
from shared.quant.errors import is_out_of_memory

if TYPE_CHECKING:
    from models.z_image.conditions import Constrain, Signals
    from models.z_image.control import ControlSignal
    from models.z_image.cuda_graph import GraphedForwards
    from models.z_image.omni import Sequences as OmniSequences
    from models.z_image.step_cache import StepCache

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Refined captions, one per picture each.

    early: stand in for `positive` while less than the share `early_end` of the steps is done.
    """

    positive: Captions | OmniSequences
    negative: Captions | OmniSequences | None = None
    early: Captions | None = None
    early_end: float = 0.0

    def positive_at(self, progress: float) -> Captions | OmniSequences:
        return self.positive if self.early is None or progress >= self.early_end else self.early


class Predictor:
    """Answers predict(latents, sigma) for one generation.

    forwards: calls of the network per picture so far. off_schedule: how many of them were at a noise level that the
    schedule does not have, for which scales and gates had to be worked out apart. saved: forwards that the step cache
    spared.
    """

    def __init__(
        self,
        transformer: ZImageTransformer | GraphedForwards,
        prompts: Prompts,
        *,
        sigmas: Sequence[float],
        guidance: ClassifierFreeGuidance,
        nag: NormalizedAttentionGuidance,
        signals: Signals | None = None,
        constrain: Constrain | None = None,
        exact: bool = False,
        cache: StepCache | None = None,
    ) -> None:
        """sigmas: the schedule that is run, which tells how far a sigma is. exact: see ZImageTransformer.forward."""
        self._cache = cache
        self.forwards = self.off_schedule = 0
        self._transformer = transformer
        self._guidance, self._attention_guidance = guidance, nag
        self.set_prompts(prompts)
        self._rising = [-sigma for sigma in sigmas]  # bisect wants a rising list
        self._exact = exact
        self._table: Timetable | None = None
        self._rows: dict[tuple[float, float | None], int] = {}  # of the table, by sigma and target
        self._signals, self._constrain = signals, constrain
        self._both_fit: bool | None = None  # both guided answers in one call; None until it is asked

    def set_prompts(self, prompts: Prompts) -> None:
        """Answer for these from now on."""
        self._prompts = prompts
        if self._cache is not None:
            self._cache.forget()
        negative = prompts.negative if self._attention_guidance.active else None
        self._nag = Nag(self._attention_guidance, negative) if isinstance(negative, Captions) else None

    def forget(self) -> None:
        """Work out anew what was kept of the network: other weights or kernels are at work from now on."""
        if self._table is not None:
            self._table.forget()
        if self._cache is not None:
            self._cache.forget()

    @property
    def saved(self) -> int:
        return 0 if self._cache is None else self._cache.saved

    def __call__(self, latents: Tensor, sigma: float, target: float | None = None) -> Tensor:
        """The velocity noise - x0, (B, C, h, w) float32, of latents at `sigma`. target: the sigma a step is for."""
        velocity = self._velocity(latents, sigma, target)
        return velocity if self._constrain is None else self._constrain(latents, velocity, sigma)

    def _velocity(self, latents: Tensor, sigma: float, target: float | None) -> Tensor:
        if self._cache is None or target is not None:  # aimed elsewhere, answers are not alike
            return -self._guided(latents, sigma, target)
        progress = self._progress(sigma)
        signal = self._signals is not None and self._signals(progress) is not None
        kind = id(self._prompts.positive_at(progress)), self._guidance.active(sigma), signal
        found = self._cache.find(latents, kind)
        if found is not None:
            return found
        before = self.forwards
        velocity = -self._guided(latents, sigma, target)
        self._cache.keep(latents, velocity, kind, self.forwards - before)
        return velocity

    def _guided(self, latents: Tensor, sigma: float, target: float | None) -> Tensor:
        progress = self._progress(sigma)
        signal = None if self._signals is None else self._signals(progress)
        positive, negative = self._prompts.positive_at(progress), self._prompts.negative
        if negative is None or not self._guidance.active(sigma):
            self.forwards += 1
            return self._ask(latents, sigma, target, positive, signal)
        self.forwards += 2
        if self._both_fit is None:
            self._both_fit = _room_for_twice(self._transformer, latents)
        if self._both_fit and isinstance(positive, Captions) and isinstance(negative, Captions):
            try:
                both = positive.followed_by(negative)
                answers = self._ask(latents.repeat(2, 1, 1, 1), sigma, target, both, signal)
                return self._guidance.combine(*answers.chunk(2))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("The two guided answers did not fit into memory together; one after the other instead.")
                self._both_fit = False
        return self._guidance.combine(
            self._ask(latents, sigma, target, positive, signal), self._ask(latents, sigma, target, negative, signal)
        )

    def _ask(
        self,
        latents: Tensor,
        sigma: float,
        target: float | None,
        captions: Captions | OmniSequences,
        signal: ControlSignal | None,
    ) -> Tensor:
        """The network's x0 - noise."""
        return self._transformer(latents, self._moment(sigma, target, latents.device), captions, signal, nag=self._nag)

    def _moment(self, sigma: float, target: float | None, device: torch.device) -> Moment:
        if self._table is None:
            asked = self._schedule(with_targets=target is not None)
            self._table, self._rows = self._timetable(asked, device), {key: row for row, key in enumerate(asked)}
        row = self._rows.get((sigma, target))
        if row is not None:
            return Moment(self._table, row)
        self.off_schedule += 1
        return Moment(self._timetable([(sigma, target)], device))

    def _schedule(self, *, with_targets: bool) -> list[tuple[float, float | None]]:
        """What will be asked, as far as the schedule tells: every level, aimed at 0, at the next level or at itself."""
        levels = [-sigma for sigma in self._rising]
        if not with_targets:
            return [(sigma, None) for sigma in dict.fromkeys(levels[:-1])]
        return list(dict.fromkeys((a, target) for a, b in pairwise(levels) for target in (0.0, b, a)))

    def _timetable(self, asked: Sequence[tuple[float, float | None]], device: torch.device) -> Timetable:
        times = upload(torch.tensor([_time(sigma) for sigma, _ in asked], dtype=torch.float32, device="cpu"), device)
        if asked[0][1] is None:
            return Timetable(times, exact=self._exact)
        targets = torch.tensor([_time(to) for _, to in asked if to is not None], dtype=torch.float32, device="cpu")
        return Timetable(times, upload(targets, device), exact=self._exact)

    def _progress(self, sigma: float) -> float:
        """The share of the steps that are done where the schedule stands at `sigma`."""
        return min(bisect_left(self._rising, -sigma) / (len(self._rising) - 1), 1.0)


def _time(sigma: float) -> float:
    """The network's time 1 - sigma runs from 0 (noise) to 1 (data). A target of sigma 0 is 0: TwinFlow learned so."""
    return 1 - sigma if sigma else 0.0


def _room_for_twice(transformer: ZImageTransformer | GraphedForwards, latents: Tensor) -> bool:
    """Whether the GPU has memory for the activations of twice as many pictures; always true elsewhere."""
    device = latents.device
    if device.type != "cuda":
        return True
    config = transformer.config
    tokens = 2 * latents[:, 0].numel() // config.patch_size**2
    # A block's widest moment: w13's halves and their product; queries, keys, values, the stream, float32 rotations.
    per_token = 3 * config.ffn_dim + 12 * config.dim
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch, not in use
    return tokens * per_token * transformer.dtype.itemsize < free

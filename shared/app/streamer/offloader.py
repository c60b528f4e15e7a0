"""The Offloader that streams: its models, the budget that they share, and the RAM that is locked for them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping

import torch
from torch import nn

from shared.app.offload import GIB, MIB
from shared.app.streamer.lane import CudaLane, Lane
from shared.app.streamer.model import StreamedModel
from shared.app.streamer.uploader import Uploader

logger = logging.getLogger(__name__)

STAGING_BYTES = 64 * MIB  # each of the two; large enough for the full rate of any bus, small enough to lock anywhere


class StreamOffload:
    """Streams the weights of several modules through one GPU: an Offloader, see offload.py."""

    name = "stream"

    def __init__(
        self, *, budget: int, lock: int = 0, lane: Callable[[], Lane] = CudaLane, staging: int = STAGING_BYTES
    ) -> None:
        """budget: most bytes of weights on the GPU. lock: most bytes of RAM to page-lock for copies of the weights.

        staging: bytes of each of the two buffers through which weights that are not locked are read.
        """
        self.budget = budget
        self._lock = lock
        self._make_lane = lane
        self._staging_bytes = staging
        self._lane: Lane | None = None
        self._uploader: Uploader | None = None
        self._models: list[StreamedModel] = []  # the one in use last

    @property
    def device(self) -> torch.device:
        return torch.device("cuda") if self._lane is None else self._lane.device

    @property
    def held(self) -> int:
        """Bytes of weights on the GPU now, the ring included."""
        return sum(model.held for model in self._models)

    def place(self, modules: Mapping[str, nn.Module]) -> None:
        """Lock the weights as far as allowed, and wait for the first forward. Raises RuntimeError if called twice.

        A budget below what a model takes at least (its trunk and one block) is raised to that, with a warning.
        """
        if self._lane is not None:
            raise RuntimeError("place() was called twice; call release() first")
        self._lane = self._make_lane()
        try:
            self._uploader = Uploader(self._lane, self._staging_bytes)
            self._models = [
                StreamedModel(name, module.eval().requires_grad_(False), self._uploader, self.budget, self._make_room)
                for name, module in modules.items()
            ]
            least = max((model.least for model in self._models), default=0)
            if least > self.budget:
                logger.warning(
                    "%.0f MiB on the GPU are too few, %.0f are used: so much takes one block and what is no block",
                    self.budget / MIB,
                    least / MIB,
                )
                self.budget = least
            self._lock_parts()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        lane, self._lane = self._lane, None
        if lane is None:
            return
        for model in self._models:
            model.close()
        lane.close()
        self._models, self._uploader = [], None
        gc.collect()
        if lane.device.type == "cuda":
            torch.cuda.empty_cache()

    def describe(self) -> str:
        if not self._models:
            return "streamed by blocks"
        return f"streamed, {self.budget / GIB:.2f} GiB for weights: " + "; ".join(m.describe() for m in self._models)

    def _lock_parts(self) -> None:
        """Page-lock the parts that travel most often first: streamed blocks, then the rest, model by model."""
        left = self._lock
        parts = [part for model in self._models for part in model.parts]
        for part in sorted(parts, key=lambda part: part.stays):  # False first; the order is kept otherwise
            if part.nbytes > left or not part.lock(self._lane):
                return
            left -= part.nbytes

    def _make_room(self, wanted: StreamedModel, nbytes: int) -> None:
        """Take room from the models used longest ago until `nbytes` more are within the budget."""
        self._models.remove(wanted)
        self._models.append(wanted)
        for model in self._models[:-1]:
            over = sum(other.claimed for other in self._models[:-1]) + wanted.held + nbytes - self.budget
            if over <= 0:
                return
            model.yield_room(over)

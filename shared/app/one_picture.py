"""One picture of a run: each drawing that it takes, watched step by step, and the latents decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shared.app.account import Account
from shared.app.clock import Clock
from shared.app.editing import Pass
from shared.app.events import OnEvent, ShouldStop, Status, StepDone
from shared.app.plan import GenerationPlan
from shared.app.retry import MemoryWatch
from shared.app.sampling_settings import MAX_SEED
from shared.quant.errors import RunError, is_out_of_memory

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from shared.app.settings import GenerationSettings


class Stopped(Exception):
    """The generation was asked to stop."""


@dataclass(slots=True, kw_only=True)
class PictureDrawing:
    """Draws picture `number` (from 1) of `pictures`, in `passes` drawings. processor: the loaded pipeline object."""

    plan: GenerationPlan
    processor: Any
    settings: GenerationSettings
    number: int
    pictures: int
    passes: int
    clock: Clock
    account: Account
    watch: MemoryWatch
    announce: OnEvent
    should_stop: ShouldStop
    _drawn: int = field(default=0, init=False)  # passes that are done
    _steps: int = field(default=0, init=False)  # of the pass that is being drawn
    _seed: int = field(default=0, init=False)  # its own

    def draw(self, asked: Pass) -> Image.Image:
        """The next drawing. Raises Stopped, and RunError for numbers that are not finite."""
        self.processor._interrupt = False
        self.watch.stage = "text"
        self._steps = self.settings.num_inference_steps
        planned = {} if self.watch.tile is None else {"VAE_tile_size": self.watch.tile}
        self._seed = (self.settings.seed + asked.seed) % (MAX_SEED + 1)
        try:
            result = self.processor.generate(
                **{**self.settings.host_kwargs(), **planned, **asked.host_kwargs(), "seed": self._seed},
                callback=self._on_step,
                set_progress_status=lambda text: self.announce(Status(str(text))),
            )
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            result = self.watch.decode_again(self.plan, self.processor, error)
        if result is None:
            raise Stopped
        self._require_finite(result, "the decoded picture")
        self.account.add(self.processor.report)
        self._drawn += 1
        return to_image(result)

    def _on_step(
        self, step: int, latents: Tensor | None = None, _first: bool = False, total: int | None = None
    ) -> None:
        """The host's callback: before the first step with `total`, then after each."""
        if self.should_stop():
            self.processor._interrupt = True
        if step < 0 or latents is None:  # the announcement before the first step
            self.watch.stage = "denoise"
            self._steps = total or self._steps
            self.clock.steps = self._steps * self.passes
            return
        done = self._drawn * self._steps + step + 1
        if latents.device.type == "cpu":  # where looking is free; a family looks after its numbers itself
            self._require_finite(latents, f"the latents after step {step + 1} of {self._steps}")
        if step + 1 == self._steps:
            self.watch.stage = "decode"
        left = self.clock.step_done(done)
        forwards = self.account.forwards + int(self.processor.report.get("forwards", 0))
        self.announce(StepDone(self.number, self.pictures, done, self.clock.steps, left, forwards))

    def _require_finite(self, values: Tensor, what: str) -> None:
        if bool(values.isfinite().all()):
            return
        kind = "NaN" if bool(values.isnan().any()) else "infinite numbers"
        raise RunError(
            f"{self.plan.preset.id}, seed {self._seed}: {what} contain {kind}; no picture was saved.",
            "The weights or their number format do not suit this device: try another file of the model, or --gpu cpu.",
        )


def to_image(pixels: Tensor) -> Image.Image:
    """The first picture of (3, N, H, W) in [-1, 1], as 8 bits per channel, rounded."""
    import torch
    from PIL import Image

    levels = ((pixels[:, 0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())

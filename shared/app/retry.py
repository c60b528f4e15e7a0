"""Out of memory: what is freed, what is tried then, and what is said when nothing helps."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shared.app.events import OnEvent, Status
from shared.app.memory_plan import Relief, next_relief
from shared.app.plan import GenerationPlan
from shared.app.presets import Preset
from shared.quant.errors import RunError, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

    from shared.app.settings import GenerationSettings

# What was going on, by stage, in words.
DOING = {
    "load": "loading the model",
    "text": "reading the prompt",
    "denoise": "drawing",
    "decode": "decoding the picture",
}


def memory_key(preset: Preset, settings: GenerationSettings) -> tuple[Any, ...]:
    """What decides how much memory a generation takes, and so whether a lesson of another one holds for it."""
    return (preset.id, settings.width, settings.height, settings.guidance_scale > 0, settings.edit.hires_scale)


class MemoryWatch:
    """Where memory may run out while a run goes on, and what was done about it when it did.

    stage: a key of DOING. tile: latent cells the picture is decoded in, None leaves the settings' own. notes: what was
    done otherwise than planned, in words.
    """

    def __init__(
        self,
        reliefs: dict[tuple[Any, ...], Relief],
        preset: Preset,
        settings: GenerationSettings,
        announce: OnEvent,
    ) -> None:
        """reliefs: what earlier runs have learned, by memory_key(); this one adds to it."""
        self.stage = "load"
        self.tile: int | None = None
        self.notes: list[str] = []
        self._tried: list[str] = []
        self._reliefs = reliefs
        self._key = memory_key(preset, settings)
        self._what = (f"{settings.width}x{settings.height}", preset.id)
        self._announce = announce

    @property
    def learned(self) -> Relief | None:
        """What memory that ran out has taught of pictures like these; None where it never did."""
        return self._reliefs.get(self._key)

    @property
    def relief(self) -> Relief:
        """The same, without anything to keep to where nothing was learned."""
        return self.learned or Relief()

    def next_relief(self, plan: GenerationPlan, stage: str) -> tuple[Relief, str] | None:
        """What to try now, and in words; None when nothing is left."""
        if plan.placement is None:
            return None
        placed = plan.placement if self.tile is None else replace(plan.placement, tile=self.tile)
        return next_relief(self.relief, stage, placed, plan.machine.device)

    def learn(self, stage: str, relief: Relief, words: str) -> None:
        """Tell what is tried now, and begin with it next time."""
        self._reliefs[self._key] = relief
        self._tried.append(words)
        self.notes.append(f"Memory ran out while {DOING[stage]}; {words}.")
        self._announce(Status(self.notes[-1]))

    def given_up(self, stage: str, error: BaseException) -> RunError:
        """The error to end with when nothing is left to try."""
        size, preset = self._what
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        before = f" Tried already: {'; '.join(self._tried)}." if self._tried else ""
        return RunError(
            f"Memory ran out while {DOING[stage]} with {preset} at {size}: {first}.{before}",
            "Take a smaller picture or a packed model (wgp.py doctor names one), or close other programs.",
        )

    def decode_again(self, plan: GenerationPlan, processor: Any, error: BaseException) -> Tensor | None:
        """The picture that memory ran out for in the decoder, from the same latents in smaller and smaller tiles.

        Raises the error where tiles are no way out: in another stage, and when the smallest do not do.
        """
        # What a Wan2GP family lacks.
        decode: Callable[[int], Tensor | None] | None = getattr(processor, "decode_again", None)
        while decode is not None and self.stage == "decode":
            found = self.next_relief(plan, "decode")
            tile = found[0].tile if found else None
            if not found or tile is None or tile == self.relief.tile:
                break
            free_memory(error)
            self.learn("decode", *found)
            self.tile = tile
            try:
                return decode(tile)
            except (MemoryError, RuntimeError, OSError) as again:
                if not is_out_of_memory(again):
                    raise
                error = again
        raise error


def free_memory(error: BaseException) -> None:
    """Let go of what a failed attempt has left: the tensors its frames hold, and memory that torch keeps for reuse."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch is not None and torch.backends.mps.is_available():
        torch.mps.empty_cache()

"""What a plan keeps to after memory ran out, and what to try next."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shared.app.device import DeviceInfo
from shared.app.memory_plan.result import Engine, MemoryPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Relief:
    """What was tried already when memory ran out, to be kept to from then on.

    tile: decode in tiles of so many latent cells at most. engine: the least that is streamed. share: of the weights'
    room that may be used.
    """

    tile: int | None = None
    engine: Engine | None = None
    share: float = 1.0


def next_relief(relief: Relief, stage: str, plan: MemoryPlan, device: DeviceInfo) -> tuple[Relief, str] | None:
    """What to try after memory ran out in `stage` under `plan`, and in words; None when nothing is left.

    A decode is first done in bands, where there are any, and in smaller and smaller tiles. Then weights are streamed
    instead of resident, then with half of their room, then two blocks at a time.
    """
    if stage == "decode":
        smaller = [tile for tile in plan.decode_ways if not plan.tile or tile < plan.tile]
        if smaller:
            return replace(relief, tile=smaller[0]), f"the picture is decoded in {plan.decode_ways[smaller[0]]}"
    if device.kind != "cuda":
        return None
    if plan.engine != "stream":
        return replace(relief, engine="stream"), "weights are streamed through the GPU block by block"
    if relief.share > 0.5:
        return replace(relief, engine="stream", share=0.5), "half as many weights stay on the GPU"
    if relief.share > 0:
        return replace(relief, engine="stream", share=0.0), "only two blocks at a time are on the GPU"
    return None

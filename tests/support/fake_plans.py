"""Plans of the fake family's presets, and machines to make them for."""

from __future__ import annotations

from typing import Any

from shared.app.context import AppContext
from shared.app.device import DeviceInfo
from shared.app.plan import Choice, GenerationPlan, Machine, make_plan
from shared.app.settings import GenerationSettings

GIB = 2**30
CARD = Machine(DeviceInfo("cuda", "Card", 89, 24 * GIB, "a test's card"), Choice("bfloat16", "native"))
CPU = Machine(DeviceInfo("cpu", "CPU", None, 16 * GIB, "asked for"), Choice("float32", "safe"))
REMOTE = "https://huggingface.co/owner/repo/resolve/main/remote.safetensors"
SHAPES = {"transformer": {"numbers": 10**9, "outside": 10**7, "blocks": 10, "width": 64, "hidden": 256}}


def plan(ctx: AppContext, preset: str = "one", machine: Machine = CPU, **overrides: Any) -> GenerationPlan:
    chosen = ctx.presets.get(preset)
    return make_plan(ctx, chosen, GenerationSettings.build(chosen, {}, {"prompt": "fox", **overrides}), machine)

"""Memory that runs out between the stages: while LoRAs are put on, and while weights are brought to the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from shared.app.context import AppContext
from shared.app.device import DeviceInfo
from shared.app.memory_plan import MemoryPlan
from shared.app.plan import Choice, Machine
from tests.support.fake_family import FakeHandler, FakeProcessor, write_weights
from tests.support.orders import order

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")


class Offload:
    """Fails to place once, if it is to."""

    name, device = "recorded", torch.device("cpu")

    def __init__(self, fails: bool) -> None:
        self.fails, self.released = fails, 0

    def place(self, modules: Mapping[str, nn.Module]) -> None:
        if self.fails:
            raise FULL

    def release(self) -> None:
        self.released += 1

    def describe(self) -> str:
        return "recorded"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The machine has a GPU; returns the engines that are used, in order."""
    machine = Machine(DeviceInfo("cuda", "Card", 89, 24 << 30, "a test's card"), Choice("float16", "asked for"))
    monkeypatch.setattr("shared.app.run.find_machine", lambda *_: machine)
    for module in ("run", "session"):
        monkeypatch.setattr(f"shared.app.{module}.find_machine_quickly", lambda *_: machine)
    return []


def use(engines: list[str], monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> list[Offload]:
    made: list[Offload] = []

    def make_offloader(device: DeviceInfo, plan: MemoryPlan, profile: float | None = None) -> Offload:
        engines.append(plan.engine)
        made.append(Offload(fails and not made))
        return made[-1]

    monkeypatch.setattr("shared.app.offload.make_offloader", make_offloader)
    return made


def test_while_weights_are_placed_they_are_let_go_of_and_streamed(
    ctx: AppContext, engines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = use(engines, monkeypatch, fails=True)

    result = ctx.session.generate("one", order(ctx))

    assert [image.seed for image in result.images] == [40]
    assert engines == ["direct", "stream"] and made[0].released == 1
    assert "streamed" in result.notes[0]
    ctx.session.generate("one", order(ctx))
    assert engines == ["direct", "stream"]  # the process goes on with what worked


def test_while_a_lora_is_loaded_the_model_is_loaded_anew_with_it(
    ctx: AppContext, handler: FakeHandler, engines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(engines, monkeypatch)
    lora = write_weights(ctx.root / "lora.safetensors")
    times = 1

    def prepare(processor: FakeProcessor) -> None:
        load = processor.load_loras

        def load_loras(*given: Any) -> Any:
            nonlocal times
            if times:
                times -= 1
                raise FULL
            return load(*given)

        processor.load_loras = load_loras  # type: ignore[method-assign]

    handler.prepare = prepare

    result = ctx.session.generate("one", order(ctx, activated_loras=[str(lora)]))

    assert len(result.images) == 1 and "Memory ran out" in result.notes[0]
    assert engines == ["direct", "stream"]
    assert handler.processors[-1].loras == [("lora.safetensors", 1.0)]

"""Memory that runs out at any stage: the picture is drawn all the same where something is left to try."""

from __future__ import annotations

import errno
import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from shared.app.clock import Clock
from shared.app.context import AppContext
from shared.app.device import DeviceInfo
from shared.app.events import Event, Status
from shared.app.memory_plan import MemoryPlan
from shared.app.metadata import read_record
from shared.app.plan import Choice, Machine
from shared.quant.errors import RunError, UserError, is_out_of_memory
from tests.support.fake_family import FakeHandler, FakeProcessor
from tests.support.orders import order

STAGES = ["load", "text", "denoise", "decode"]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


class Shortage:
    """Lets memory run out in a stage, `times` times. tiles: those that each generate() was told to decode in."""

    def __init__(self, handler: FakeHandler, stage: str, times: int, error: BaseException | None = None) -> None:
        self.stage, self.times = stage, times
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")
        self.tiles: list[Any] = []
        handler.prepare = self.prepare

    def strike(self, stage: str) -> None:
        if stage == self.stage and self.times:
            self.times -= 1
            raise self.error

    def prepare(self, processor: FakeProcessor) -> None:
        self.strike("load")
        draw = processor.generate

        def generate(**kwargs: Any) -> torch.Tensor | None:
            self.tiles.append(kwargs.get("VAE_tile_size"))
            self.strike("text")
            result = draw(**kwargs)
            self.strike("decode")
            return result

        processor.on_call = lambda processor, step: self.strike("denoise") if step == 1 else None
        processor.generate = generate  # type: ignore[method-assign]


class RecordedOffload:
    name = "recorded"
    device = torch.device("cpu")

    def place(self, modules: Mapping[str, nn.Module]) -> None: ...

    def release(self) -> None: ...

    def describe(self) -> str:
        return "recorded"


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[MemoryPlan]:
    """The machine has a GPU; returns the plans that are carried out, in order."""
    machine = Machine(DeviceInfo("cuda", "Card", 89, 24 << 30, "a test's card"), Choice("float16", "asked for"))
    monkeypatch.setattr("shared.app.run.find_machine", lambda *_: machine)
    for module in ("run", "session"):
        monkeypatch.setattr(f"shared.app.{module}.find_machine_quickly", lambda *_: machine)
    made: list[MemoryPlan] = []

    def make_offloader(device: DeviceInfo, plan: MemoryPlan, profile: float | None = None) -> RecordedOffload:
        made.append(plan)
        return RecordedOffload()

    monkeypatch.setattr("shared.app.offload.make_offloader", make_offloader)
    return made


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stage", STAGES)
def test_memory_that_runs_out_once_on_a_gpu_costs_a_note_and_no_picture(
    ctx: AppContext, handler: FakeHandler, plans: list[MemoryPlan], stage: str, error: BaseException
) -> None:
    Shortage(handler, stage, 1, error)
    events: list[Event] = []

    result = ctx.session.generate("one", order(ctx), on_event=events.append)

    assert [image.seed for image in result.images] == [40]
    assert len(result.notes) == 1 and "Memory ran out" in result.notes[0]
    assert Status(result.notes[0]) in events
    record = read_record(result.images[0].path)
    assert record is not None and record["provenance"]["notes"] == result.notes
    assert result.as_dict()["notes"] == result.notes


def test_each_shortage_of_drawing_leaves_fewer_weights_on_the_gpu_until_nothing_is_left(
    ctx: AppContext, handler: FakeHandler, plans: list[MemoryPlan]
) -> None:
    Shortage(handler, "denoise", 99)

    with pytest.raises(RunError, match=r"drawing with one at 64x48.*Tried already.*streamed.*half.*two blocks"):
        ctx.session.generate("one", order(ctx))

    assert [plan.engine for plan in plans] == ["direct", "stream", "stream", "stream"]


def test_each_shortage_of_decoding_makes_tiles_smaller_without_loading_again(
    ctx: AppContext, handler: FakeHandler, plans: list[MemoryPlan]
) -> None:
    shortage = Shortage(handler, "decode", 3)

    result = ctx.session.generate("one", order(ctx))

    assert shortage.tiles == [0, 64, 32, 16]
    assert len(handler.loads) == 1
    assert len(result.notes) == 3


def test_a_drawn_picture_is_decoded_again_and_not_drawn_again(
    ctx: AppContext, handler: FakeHandler, plans: list[MemoryPlan]
) -> None:
    tiles: list[int] = []

    def prepare(processor: FakeProcessor) -> None:
        drawn: list[torch.Tensor | None] = []
        draw = processor.generate

        def generate(**kwargs: Any) -> torch.Tensor | None:
            drawn[:] = [draw(**kwargs)]
            if kwargs["VAE_tile_size"] == 0:
                raise ERRORS[0]
            return drawn[0]

        def decode_again(tile: int) -> torch.Tensor | None:
            tiles.append(tile)
            if tile > 16:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return drawn[0]

        processor.generate = generate  # type: ignore[method-assign]
        processor.decode_again = decode_again  # type: ignore[attr-defined]

    handler.prepare = prepare

    result = ctx.session.generate("one", order(ctx, batch_size=2))

    assert [image.seed for image in result.images] == [40, 41]
    assert tiles == [64, 32, 16] and len(result.notes) == 3
    assert [call["seed"] for p in handler.processors for call in p.calls] == [40, 41]
    assert [call["VAE_tile_size"] for p in handler.processors for call in p.calls] == [0, 16]


def test_a_decode_that_no_tile_helps_has_its_weights_streamed(
    ctx: AppContext, handler: FakeHandler, plans: list[MemoryPlan]
) -> None:
    def prepare(processor: FakeProcessor) -> None:
        draw = processor.generate

        def fail(*_: Any, **kwargs: Any) -> torch.Tensor | None:
            if kwargs:
                draw(**kwargs)
            raise torch.OutOfMemoryError("CUDA out of memory")

        processor.generate = fail  # type: ignore[method-assign]
        processor.decode_again = fail  # type: ignore[attr-defined]

    handler.prepare = prepare

    with pytest.raises(RunError, match=r"64 latent.*32 latent.*16 latent.*streamed.*half.*two blocks"):
        ctx.session.generate("one", order(ctx))

    assert [plan.engine for plan in plans] == ["direct", "stream", "stream", "stream"]
    assert [plan.tile for plan in plans] == [0, 16, 16, 16]


def test_on_a_cpu_a_decode_that_is_too_large_is_done_in_tiles(ctx: AppContext, handler: FakeHandler) -> None:
    shortage = Shortage(handler, "decode", 1, ERRORS[2])

    result = ctx.session.generate("one", order(ctx))

    assert shortage.tiles == [0, 64]
    assert len(result.images) == 1


@pytest.mark.parametrize("stage", ["load", "text", "denoise"])
def test_on_a_cpu_the_end_of_memory_is_told_and_the_next_picture_is_drawn(
    ctx: AppContext, handler: FakeHandler, stage: str
) -> None:
    Shortage(handler, stage, 1, MemoryError())

    with pytest.raises(RunError, match="Memory ran out"):
        ctx.session.generate("one", order(ctx))

    assert len(ctx.session.generate("one", order(ctx)).images) == 1


def test_pictures_that_were_finished_are_kept_and_not_drawn_again(
    ctx: AppContext, handler: FakeHandler, plans: list[MemoryPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler.prepare = lambda processor: setattr(processor, "on_call", strike_at_second_picture)
    struck: list[int] = []
    expected: list[int] = []

    class CountingClock(Clock):
        def __init__(self, *, images: int, steps: int) -> None:
            expected.append(images)
            super().__init__(images=images, steps=steps)

    monkeypatch.setattr("shared.app.run.Clock", CountingClock)

    def strike_at_second_picture(processor: FakeProcessor, step: int) -> None:
        if processor.calls[-1]["seed"] == 41 and not struck:
            struck.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory")

    result = ctx.session.generate("one", order(ctx, batch_size=3))

    assert [image.seed for image in result.images] == [40, 41, 42]
    assert [call["seed"] for p in handler.processors for call in p.calls] == [40, 41, 41, 42]
    assert expected == [3, 2], "the time left is that of the pictures that are left"


def test_the_lesson_holds_for_the_next_picture_of_the_same_size_only(
    ctx: AppContext, handler: FakeHandler, plans: list[MemoryPlan]
) -> None:
    Shortage(handler, "denoise", 1)
    ctx.session.generate("one", order(ctx))

    again = ctx.session.generate("one", order(ctx))

    assert again.notes == []
    assert [plan.engine for plan in plans] == ["direct", "stream"]
    assert ctx.session.plan("one", order(ctx)).offload.value == "stream"
    assert ctx.session.plan("one", order(ctx, resolution="32x32")).offload.value == "direct"


def test_what_the_failed_attempt_held_is_freed_before_the_next(
    ctx: AppContext, handler: FakeHandler, plans: list[MemoryPlan]
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def strike(processor: FakeProcessor, step: int) -> None:
        alive.append(any(ref() is not None for ref in held))
        if not held:
            activations = torch.zeros(1000)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")

    handler.prepare = lambda processor: setattr(processor, "on_call", strike)

    ctx.session.generate("one", order(ctx))
    gc.collect()

    assert alive == [False] * 4
    assert len(handler.loads) == 2


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_form_of_running_out_is_known(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        OSError(errno.ENOSPC, "No space left"),
        UserError("out of memory"),
        ValueError(),
    ],
)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_other_errors_end_the_generation_as_before(ctx: AppContext, handler: FakeHandler) -> None:
    Shortage(handler, "denoise", 1, RuntimeError("shapes do not match"))

    with pytest.raises(RuntimeError, match="shapes do not match"):
        ctx.session.generate("one", order(ctx))

"""Numbers that are not finite: named, never saved, and drawn again in a wider type where that helps."""

from __future__ import annotations

from typing import Any

import pytest

from shared.app.context import AppContext
from shared.app.device import DeviceInfo
from shared.app.events import Event, Status
from shared.app.plan import Choice, Machine
from shared.quant.errors import NumbersError, RunError
from tests.support.fake_family import FakeHandler, FakeProcessor, fake_context
from tests.support.orders import files_in, order


@pytest.mark.parametrize(
    ("spoilt", "named"), [("latents", "the latents after step 1 of 3 contain NaN"), ("picture", "infinite numbers")]
)
def test_numbers_that_are_not_finite_are_named_and_not_saved(
    ctx: AppContext, handler: FakeHandler, spoilt: str, named: str
) -> None:
    handler.prepare = lambda processor: setattr(processor, "spoil", spoilt)

    with pytest.raises(RunError, match=named):
        ctx.session.generate("one", order(ctx))

    assert files_in(ctx.output_folder) == []


def narrow(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine's first choice be float16, as on a GPU without bfloat16."""

    def machine(preset: Any, prefer: str = "") -> Machine:
        device = DeviceInfo("cpu", "Narrow", None, 2**33, "pretended")
        return Machine(device, Choice("float16", "it multiplies nothing wider fast"))

    monkeypatch.setattr("shared.app.run.find_machine", machine)
    for module in ("run", "session"):
        monkeypatch.setattr(f"shared.app.{module}.find_machine_quickly", machine)


def dtypes_of(handler: FakeHandler) -> list[str]:
    return [str(keywords["dtype"]).removeprefix("torch.") for _, keywords in handler.loads]


def test_numbers_too_large_for_float16_are_drawn_in_a_wider_type_from_then_on(
    ctx: AppContext, handler: FakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(ctx, monkeypatch)

    def overflow(processor: FakeProcessor, step: int) -> None:
        if dtypes_of(handler)[-1] == "float16" and processor.steps_done == 4:  # in the second picture
            raise NumbersError("Not drawn: NaN in the latents after step 2 of 3.")

    handler.prepare = lambda processor: setattr(processor, "on_call", overflow)
    events: list[Event] = []

    result = ctx.session.generate("one", order(ctx, batch_size=2), on_event=events.append)
    later = fake_context(ctx.root, handler).session.generate("one", order(ctx))

    assert dtypes_of(handler) == ["float16", "float32", "float32"]
    assert [image.seed for image in result.images] == [40, 41]  # the first was kept
    assert [image.record["provenance"]["dtype"] for image in result.images] == ["float16", "float32"]
    assert later.images[0].record["provenance"]["dtype"] == "float32"
    assert any("Drawing again in float32" in event.text for event in events if isinstance(event, Status))


def test_numbers_that_stay_bad_in_the_wider_type_are_an_error(
    ctx: AppContext, handler: FakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(ctx, monkeypatch)

    def broken(processor: FakeProcessor, step: int) -> None:
        raise NumbersError("Not drawn: NaN in the latents after step 1 of 3.")

    handler.prepare = lambda processor: setattr(processor, "on_call", broken)

    with pytest.raises(NumbersError, match="step 1 of 3"):
        ctx.session.generate("one", order(ctx))
    assert dtypes_of(handler) == ["float16", "float32"]


def test_a_remedy_is_remembered_for_file_and_device_and_does_not_load_again(
    ctx: AppContext, handler: FakeHandler
) -> None:
    def repaired(processor: FakeProcessor, step: int) -> None:
        processor.remedies = {"attention": "attention by plain matrix products", "compute": "1 layer expanded"}

    handler.prepare = lambda processor: setattr(processor, "on_call", repaired)

    first = ctx.session.generate("one", order(ctx, batch_size=2))
    handler.prepare = lambda processor: None
    ctx.session.generate("one", order(ctx))
    loads = len(handler.loads)
    elsewhere = fake_context(ctx.root, handler)
    plan = elsewhere.session.plan("one", order(ctx))
    elsewhere.session.generate("one", order(ctx))
    other = ctx.session.plan("two", order(ctx, "two"))

    assert loads == 1
    assert first.images[0].record["provenance"]["safer"]["attention"] == "attention by plain matrix products"
    assert plan.compute.value == "bf16"
    assert "numbers were bad" in plan.attention.reason
    assert handler.loads[1][1]["safer"] == ("attention", "compute")
    assert other.safer == plan.safer  # the same bytes under another name


def test_a_flag_stands_above_what_is_remembered(ctx: AppContext, handler: FakeHandler) -> None:
    handler.prepare = lambda processor: setattr(
        processor, "on_call", lambda own, step: setattr(own, "remedies", {"attention": "plain", "compute": "expanded"})
    )
    ctx.session.generate("one", order(ctx))

    asked = fake_context(ctx.root, handler, attention="sdpa", compute="int8").session.plan("one", order(ctx))

    assert asked.compute.value == "int8"
    assert (asked.attention.reason, asked.safer) == ("asked for", ("compute",))

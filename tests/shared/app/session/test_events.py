"""Events on the way: steps, time left, seconds by stage, downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.app.context import AppContext
from shared.app.events import Event, GenerationResult, ImageDone, Status, StepDone
from shared.quant.errors import UserError
from tests.support.fake_family import FakeHandler, write_preset, write_weights
from tests.support.orders import order


def test_events_count_steps_and_pictures_from_one(ctx: AppContext) -> None:
    events: list[Event] = []

    ctx.session.generate("one", order(ctx, batch_size=2), on_event=events.append)

    steps = [(event.image, event.images, event.step, event.steps) for event in events if isinstance(event, StepDone)]
    assert steps == [(1, 2, 1, 3), (1, 2, 2, 3), (1, 2, 3, 3), (2, 2, 1, 3), (2, 2, 2, 3), (2, 2, 3, 3)]
    assert [event.image for event in events if isinstance(event, ImageDone)] == [1, 2]
    assert isinstance(events[0], Status)


def test_the_time_left_is_unknown_at_first_and_nearly_nothing_at_last(ctx: AppContext) -> None:
    events: list[Event] = []

    ctx.session.generate("one", order(ctx), on_event=events.append)

    left = [event.seconds_left for event in events if isinstance(event, StepDone)]
    assert left[0] is None
    assert left[-1] == 0.0


def test_seconds_are_summed_over_the_pictures_by_stage(ctx: AppContext) -> None:
    result = ctx.session.generate("one", order(ctx, batch_size=2))

    stages = {stage: result.seconds[stage] for stage in ("text", "denoise", "decode")}
    assert stages == {"text": 0.5, "denoise": 2.0, "decode": 1.0}
    assert 0 < result.seconds["load"] <= result.seconds["total"]
    assert result.forwards == 3
    assert result.peak_rss_mb is not None and result.peak_rss_mb > 10


def test_a_stream_yields_the_events_and_returns_the_result(ctx: AppContext) -> None:
    stream = ctx.session.stream("one", order(ctx))
    events: list[Event] = []
    while True:
        try:
            events.append(next(stream))
        except StopIteration as end:
            result: GenerationResult = end.value
            break

    assert isinstance(events[-1], ImageDone)
    assert result.images == [events[-1]]


def test_a_stream_raises_what_went_wrong(ctx: AppContext) -> None:
    write_preset(ctx.root, "gone", URLs=["file:weights/nothing.safetensors"])
    ctx.refresh_presets()

    with pytest.raises(UserError, match=r"nothing\.safetensors"):
        list(ctx.session.stream("gone", order(ctx, "gone")))


def test_missing_files_are_fetched_with_progress_before_loading(
    ctx: AppContext, handler: FakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "https://huggingface.co/owner/repo/resolve/main/remote.safetensors"
    write_preset(ctx.root, "remote", URLs=[url])
    ctx.refresh_presets()
    asked: list[str] = []

    def ensure(address: str, **_: Any) -> Path:
        asked.append(address)
        assert handler.loads == []
        return write_weights(ctx.root / "ckpts" / "remote.safetensors")

    monkeypatch.setattr(ctx.files, "ensure", ensure)

    ctx.session.generate("remote", order(ctx, "remote"))

    assert asked == [url]
    assert [Path(file).name for file in handler.loads[0][0][0]] == ["remote.safetensors"]

"""A session that draws from pictures: what reaches the model, what is recorded, and that it can be drawn again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.app.context import AppContext
from shared.app.download import DownloadCancelled, DownloadProgress
from shared.app.events import Downloading, Event, ShouldStop, Status, StepDone
from shared.app.metadata import read_record
from shared.app.settings import GenerationSettings
from shared.quant.errors import UserError
from tests.support.fake_family import FakeHandler, write_preset
from tests.support.orders import order, pixels


def put(path: Path, width: int = 128, height: int = 96) -> str:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def put_mask(path: Path) -> str:
    mask = Image.new("L", (128, 96))
    mask.paste(255, (80, 40, 100, 60))
    mask.save(path)
    return str(path)


def test_references_are_copied_recorded_and_drawn_from_again(
    ctx: AppContext, handler: FakeHandler, tmp_path: Path
) -> None:
    given = [put(tmp_path / "r.png"), put_mask(tmp_path / "s.png")]
    write_preset(tmp_path, "omni", image_ref_choices={"choices": [["Reference Pictures", "I"]]})
    ctx.refresh_presets()
    first = ctx.session.generate("omni", order(ctx, image_refs=given)).images[0]
    for path in given:
        Path(path).unlink()

    record = read_record(first.path)
    assert record is not None
    ctx.session.generate("omni", GenerationSettings.build(ctx.presets.get("omni"), record))

    assert record["video_prompt_type"] == "I"
    assert [len(call["input_ref_images"]) for call in handler.processors[0].calls] == [2, 2]
    assert all(name.startswith("inputs/") for name in record["image_refs"])


def test_picture_mask_and_strength_reach_the_model(ctx: AppContext, handler: FakeHandler, tmp_path: Path) -> None:
    ctx.session.generate(
        "one",
        order(
            ctx, image_start=put(tmp_path / "a.png"), image_mask=put_mask(tmp_path / "m.png"), denoising_strength=0.7
        ),
    )

    (call,) = handler.processors[0].calls
    assert call["image_start"].shape == (3, call["height"], call["width"])
    assert set(call["input_masks"].unique().tolist()) == {0.0, 1.0}
    assert call["denoising_strength"] == 0.7
    assert "input_frames" not in call


def test_an_inpainted_picture_can_be_drawn_again_after_its_sources_are_gone(ctx: AppContext, tmp_path: Path) -> None:
    start, mask = put(tmp_path / "secret_name.png"), put_mask(tmp_path / "m.png")
    first = ctx.session.generate("one", order(ctx, image_start=start, image_mask=mask)).images[0]
    before = pixels(Path(start))
    Path(start).unlink()
    Path(mask).unlink()

    record = read_record(first.path)
    again = ctx.session.generate("one", GenerationSettings.build(ctx.presets.get("one"), record)).images[0]

    assert "secret_name" not in str(record)
    assert record["video_prompt_type"] == "VA"
    assert np.array_equal(pixels(again.path), pixels(first.path))
    kept = np.ones((96, 128), bool)
    kept[30:70, 70:110] = False
    assert np.array_equal(pixels(first.path)[kept], before[kept])
    assert not np.array_equal(pixels(first.path), before)


def test_two_passes_are_one_picture_with_one_count_of_steps(ctx: AppContext, handler: FakeHandler) -> None:
    events: list[Any] = []

    result = ctx.session.generate("one", order(ctx, hires_scale=2, num_inference_steps=3), on_event=events.append)

    calls = handler.processors[0].calls
    steps = [(event.step, event.steps) for event in events if isinstance(event, StepDone)]
    assert [(call["width"], call["height"]) for call in calls] == [(64, 48), (128, 96)]
    assert steps == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]
    assert result.forwards == 6
    assert pixels(result.images[0].path).shape == (96, 128, 3)


def test_forwards_are_told_step_by_step_over_both_passes(ctx: AppContext, handler: FakeHandler) -> None:
    events: list[Any] = []
    # As a sampler that asks twice at each step; the report at the end of a pass says 3.
    handler.prepare = lambda processor: setattr(
        processor, "on_call", lambda own, step: own.report.update(forwards=2 * (step + 1))
    )

    ctx.session.generate("one", order(ctx, hires_scale=2, num_inference_steps=3), on_event=events.append)

    assert [event.forwards for event in events if isinstance(event, StepDone)] == [2, 4, 6, 3 + 2, 3 + 4, 3 + 6]


def test_the_download_of_a_preprocessor_is_shown_and_can_be_stopped(
    ctx: AppContext, handler: FakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = DownloadProgress("hed.onnx", 1, 2, 0.0)

    def fetch(
        files: object, edit: object, *, on_progress: Callable[[DownloadProgress], None], should_stop: ShouldStop
    ) -> None:
        on_progress(progress)
        if should_stop():
            raise DownloadCancelled("stopped")

    monkeypatch.setattr("shared.app.run.fetch", fetch)
    seen: list[Event] = []

    result = ctx.session.generate(
        "one", order(ctx), on_event=seen.append, should_stop=lambda: Downloading(progress) in seen
    )

    assert result.cancelled and handler.loads == []


def test_cancelling_between_two_passes_leaves_no_picture(ctx: AppContext) -> None:
    seen: list[Any] = []

    result = ctx.session.generate(
        "one", order(ctx, hires_scale=2, num_inference_steps=3), on_event=seen.append,
        should_stop=lambda: sum(isinstance(event, StepDone) for event in seen) >= 4,
    )  # fmt: skip

    assert result.cancelled
    assert result.images == []


def test_a_bad_picture_is_told_before_the_model_is_loaded(ctx: AppContext, handler: FakeHandler) -> None:
    with pytest.raises(UserError, match="there_is_none"):
        ctx.session.generate("one", order(ctx, image_start="there_is_none.png"))

    assert handler.loads == []


def test_what_was_decided_about_a_picture_is_said(ctx: AppContext, tmp_path: Path) -> None:
    events: list[Any] = []

    ctx.session.generate("one", order(ctx, image_start=put(tmp_path / "a.png")), on_event=events.append)

    said = [event.text for event in events if isinstance(event, Status)]
    assert "Note: denoising_strength is 1, so nothing of the picture will show." in said

"""Clean ends: stopped within a step, pictures that are done kept, nothing half written, errors before loading."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.app.context import AppContext
from shared.app.events import Event, GenerationResult, ImageDone, StepDone
from shared.quant.errors import RunError, UserError
from tests.support.fake_family import FakeHandler, FakeProcessor, write_preset
from tests.support.orders import files_in, order


def test_cancel_from_another_thread_stops_within_one_step(ctx: AppContext, handler: FakeHandler) -> None:
    def cancel_elsewhere(processor: FakeProcessor, step: int) -> None:
        if processor.steps_done == 4:  # second picture, before its second step
            thread = threading.Thread(target=ctx.session.cancel)
            thread.start()
            thread.join()

    handler.prepare = lambda processor: setattr(processor, "on_call", cancel_elsewhere)

    result = ctx.session.generate("one", order(ctx, batch_size=3))

    assert result.cancelled
    assert [image.seed for image in result.images] == [40]
    assert handler.processors[0].steps_done == 4


def test_a_cancelled_session_draws_again(ctx: AppContext, handler: FakeHandler) -> None:
    stops = iter([False, True])

    first = ctx.session.generate("one", order(ctx), should_stop=lambda: next(stops, True))
    second = ctx.session.generate("one", order(ctx))

    assert first.cancelled and first.images == []
    assert not second.cancelled and len(second.images) == 1


def test_should_stop_is_asked_at_every_step(ctx: AppContext, handler: FakeHandler) -> None:
    result = ctx.session.generate(
        "one", order(ctx, num_inference_steps=8), should_stop=lambda: bool(handler.processors)
    )

    assert result.cancelled
    assert handler.processors[0].steps_done == 0


def test_closing_a_stream_stops_the_drawing(ctx: AppContext, handler: FakeHandler) -> None:
    gate = threading.Semaphore(1)
    handler.prepare = lambda processor: setattr(processor, "on_call", lambda *_: gate.acquire(timeout=20))

    stream = ctx.session.stream("one", order(ctx, num_inference_steps=50))
    for event in stream:
        if isinstance(event, StepDone):
            break
    stream.close()
    gate.release(50)
    ctx.session.release()  # waits for the drawing to end

    assert handler.processors[0].steps_done <= 2
    assert files_in(ctx.output_folder) == []


def test_a_waiting_call_can_be_stopped_while_another_draws(ctx: AppContext, handler: FakeHandler) -> None:
    waiting: list[GenerationResult] = []

    def try_meanwhile(processor: FakeProcessor, step: int) -> None:
        if step == 0:
            thread = threading.Thread(
                target=lambda: waiting.append(ctx.session.generate("one", order(ctx), should_stop=lambda: True))
            )
            thread.start()
            thread.join()

    handler.prepare = lambda processor: setattr(processor, "on_call", try_meanwhile)

    result = ctx.session.generate("one", order(ctx))

    assert waiting[0].cancelled and waiting[0].images == []
    assert not result.cancelled


def test_a_keyboard_interrupt_keeps_the_pictures_that_are_done(ctx: AppContext, handler: FakeHandler) -> None:
    def interrupt(processor: FakeProcessor, step: int) -> None:
        if len(processor.calls) == 2:
            raise KeyboardInterrupt

    handler.prepare = lambda processor: setattr(processor, "on_call", interrupt)

    with pytest.raises(KeyboardInterrupt):
        ctx.session.generate("one", order(ctx, batch_size=3))

    assert [name.split("_")[1] for name in files_in(ctx.output_folder)] == ["seed40"]


def test_a_full_disk_leaves_no_partial_file_and_keeps_earlier_pictures(
    ctx: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []

    def fsync(number: int) -> None:
        if any(isinstance(event, ImageDone) for event in events):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)

    with pytest.raises(RunError, match=r"seed41.*could not be written: No space left"):
        ctx.session.generate("one", order(ctx, batch_size=2), on_event=events.append)

    assert [name.split("_")[1] for name in files_in(ctx.output_folder)] == ["seed40"]


def test_running_out_of_gpu_memory_says_what_to_do(ctx: AppContext, handler: FakeHandler) -> None:
    def run_out(processor: FakeProcessor, step: int) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 4.00 GiB")

    handler.prepare = lambda processor: setattr(processor, "on_call", run_out)

    with pytest.raises(RunError, match="64x48") as caught:
        ctx.session.generate("one", order(ctx))

    assert "smaller picture" in caught.value.hint


def test_a_truncated_weights_file_is_named_before_anything_is_loaded(ctx: AppContext, handler: FakeHandler) -> None:
    weights = ctx.root / "weights" / "one" / "vae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])

    with pytest.raises(UserError, match=r"vae\.safetensors"):
        ctx.session.generate("one", order(ctx))

    assert handler.loads == []


def test_an_unwritable_output_is_an_error_before_anything_is_loaded(ctx: AppContext, handler: FakeHandler) -> None:
    (ctx.root / "file").write_text("")

    with pytest.raises(UserError, match="cannot be written"):
        ctx.session.generate("one", order(ctx), output=ctx.root / "file" / "picture.png")

    assert handler.loads == []


def test_cancel_stops_the_drawing_call_and_not_one_that_waits_longer(ctx: AppContext, handler: FakeHandler) -> None:
    waits, may_go_on = threading.Event(), threading.Event()
    first: list[GenerationResult] = []

    def held_up() -> bool:
        waits.set()
        may_go_on.wait(timeout=20)
        return False

    def cancel_once(processor: FakeProcessor, step: int) -> None:
        if not may_go_on.is_set():
            ctx.session.cancel()

    handler.prepare = lambda processor: setattr(processor, "on_call", cancel_once)
    with ctx.session._one_at_a_time:
        thread = threading.Thread(
            target=lambda: first.append(ctx.session.generate("one", order(ctx), should_stop=held_up))
        )
        thread.start()
        assert waits.wait(timeout=20)  # the first call looks whether it was stopped, and is not done with it

    second = ctx.session.generate("one", order(ctx))
    may_go_on.set()
    thread.join()

    assert second.cancelled
    assert not first[0].cancelled


def test_a_cancelled_download_is_a_cancelled_generation(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.app.download import DownloadCancelled

    write_preset(ctx.root, "remote", URLs=["https://huggingface.co/owner/repo/resolve/main/remote.safetensors"])
    ctx.refresh_presets()

    def ensure(address: str, **_: Any) -> Path:
        raise DownloadCancelled("stopped")

    monkeypatch.setattr(ctx.files, "ensure", ensure)

    assert ctx.session.generate("remote", order(ctx, "remote")).cancelled

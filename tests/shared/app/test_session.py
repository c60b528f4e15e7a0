"""What a session promises: order, events, records, one model in memory, and clean ends."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared.app.context import AppContext
from shared.app.device import DeviceInfo
from shared.app.events import Event, GenerationResult, ImageDone, Status, StepDone
from shared.app.metadata import read_record
from shared.app.one_picture import to_image
from shared.app.plan import Choice, Machine
from shared.app.settings import GenerationSettings
from shared.quant.errors import NumbersError, RunError, UserError
from tests.support.fake_family import FakeHandler, FakeProcessor, fake_context, write_preset, write_weights


@pytest.fixture
def handler() -> FakeHandler:
    return FakeHandler()


@pytest.fixture
def ctx(tmp_path: Path, handler: FakeHandler) -> AppContext:
    write_preset(tmp_path, "one")
    write_preset(tmp_path, "two")
    return fake_context(tmp_path, handler)


def order(ctx: AppContext, preset: str = "one", **overrides: Any) -> GenerationSettings:
    return GenerationSettings.build(ctx.presets.get(preset), {}, {"prompt": "A red Fox!", "seed": 40, **overrides})


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# ---------------------------------------------------------------------------------------- pictures


def test_a_batch_is_drawn_one_by_one_each_with_its_own_seed(ctx: AppContext, handler: FakeHandler) -> None:
    result = ctx.session.generate("one", order(ctx, batch_size=3))

    assert [(call["seed"], call["batch_size"]) for call in handler.processors[0].calls] == [(40, 1), (41, 1), (42, 1)]
    assert [image.seed for image in result.images] == [40, 41, 42]
    assert [image.path.exists() for image in result.images] == [True] * 3


def test_every_picture_can_be_drawn_again_alone_from_its_own_record(ctx: AppContext) -> None:
    second = ctx.session.generate("one", order(ctx, batch_size=2)).images[1]

    record = read_record(second.path)
    restored = GenerationSettings.build(ctx.presets.get("one"), record)
    again = ctx.session.generate("one", restored).images[0]

    assert restored.notes == ()
    assert again.seed == 41
    assert np.array_equal(pixels(again.path), pixels(second.path))


def test_the_record_inside_the_picture_is_the_one_in_the_event(ctx: AppContext) -> None:
    image = ctx.session.generate("one", order(ctx)).images[0]

    assert read_record(image.path) == image.record
    assert "WanGP" in image.record["type"]
    assert image.record["resolution"] == "64x48"
    assert image.record["model_type"] == "one"
    assert image.record["base_model_type"] == "fake"
    assert image.record["model_filename"] == "transformer.safetensors"


def test_the_record_names_the_weights_by_hash_and_no_folder_of_this_machine(ctx: AppContext, tmp_path: Path) -> None:
    result = ctx.session.generate("one", order(ctx))

    in_record = result.images[0].record["provenance"]["files"]
    assert [file["name"] for file in in_record] == [Path(file["path"]).name for file in result.files]
    assert [file["sha256"] for file in in_record] == [file["sha256"] for file in result.files]
    assert str(tmp_path) not in json.dumps(result.images[0].record)


def test_pixels_are_rounded_to_the_nearest_of_256_levels() -> None:
    levels = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 7.0]).expand(3, 1, 1, 6)

    assert np.asarray(to_image(levels))[0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]


def test_names_hold_date_seed_and_words_of_the_prompt(ctx: AppContext) -> None:
    name = ctx.session.generate("one", order(ctx)).images[0].path.name

    assert name.endswith("_seed40_a-red-fox.png")
    assert name[4] == name[7] == name[10] == "-" and name[13] == "h" and name[16] == "m" and name[19] == "s"


# ---------------------------------------------------------------------------------------- events


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


# ---------------------------------------------------------------------------------------- loading


def test_load_model_is_called_as_a_wan2gp_host_calls_it(ctx: AppContext, handler: FakeHandler) -> None:
    ctx.session.generate("one", order(ctx))

    (files, model_type, base_model_type, model_def), keywords = handler.loads[0]
    assert [Path(file).name for file in files] == ["transformer.safetensors"]
    assert (model_type, base_model_type, model_def["name"]) == ("one", "fake", "Name of one")
    assert Path(keywords["text_encoder_filename"]).name == "text_encoder.safetensors"
    assert Path(keywords["vae_filename"]).name == "vae.safetensors"
    assert isinstance(keywords["dtype"], torch.dtype) and keywords["VAE_dtype"] == torch.float32
    assert keywords["profile"] == -1
    assert "tokenizer_folder" in keywords


def test_modules_follow_the_transformer_in_the_list(ctx: AppContext, handler: FakeHandler) -> None:
    write_weights(ctx.root / "ckpts" / "control.safetensors")
    write_preset(ctx.root, "with_module", modules=[["control.safetensors"]])
    ctx.refresh_presets()

    image = ctx.session.generate("with_module", order(ctx, "with_module")).images[0]

    assert [Path(file).name for file in handler.loads[0][0][0]] == ["transformer.safetensors", "control.safetensors"]
    assert image.record["modules"] == ["control.safetensors"]


def test_the_model_stays_loaded_for_the_next_call(ctx: AppContext, handler: FakeHandler) -> None:
    ctx.session.generate("one", order(ctx))
    ctx.session.generate("one", order(ctx, seed=1))

    assert len(handler.loads) == 1


def test_another_preset_replaces_the_model(ctx: AppContext, handler: FakeHandler) -> None:
    for preset in ("one", "two", "one"):
        ctx.session.generate(preset, order(ctx, preset))

    assert [arguments[1] for arguments, _ in handler.loads] == ["one", "two", "one"]


def test_release_lets_go_of_the_model(ctx: AppContext, handler: FakeHandler) -> None:
    ctx.session.generate("one", order(ctx))
    ctx.session.release()
    ctx.session.generate("one", order(ctx))

    assert len(handler.loads) == 2


def test_a_configuration_of_the_preset_is_what_gets_loaded(ctx: AppContext, handler: FakeHandler) -> None:
    write_weights(ctx.root / "ckpts" / "other_vae.safetensors")
    write_preset(ctx.root, "sets", configs={"sharp": {"VAE_URLs": ["other_vae.safetensors"]}})
    ctx.refresh_presets()

    ctx.session.generate("sets", order(ctx, "sets", config=",,,sharp"))

    assert Path(handler.loads[0][1]["vae_filename"]).name == "other_vae.safetensors"


# ---------------------------------------------------------------------------------------- LoRA


def test_loras_are_found_as_given_and_in_the_lora_folder(ctx: AppContext, handler: FakeHandler) -> None:
    elsewhere = write_weights(ctx.root / "elsewhere" / "a.safetensors")
    write_weights(ctx.root / "lora_root" / "fake" / "style" / "b.safetensors")
    wanted = {"activated_loras": [str(elsewhere), "style/b.safetensors"], "loras_multipliers": "0.5 -1"}

    result = ctx.session.generate("one", order(ctx, **wanted))

    assert handler.processors[0].loras == [("a.safetensors", 0.5), ("b.safetensors", -1.0)]
    assert {"a.safetensors", "b.safetensors"} <= {Path(file["path"]).name for file in result.files}


def test_the_presets_own_loras_come_before_the_users(ctx: AppContext, handler: FakeHandler) -> None:
    for name in ("own", "users"):
        write_weights(ctx.root / "lora_root" / "fake" / f"{name}.safetensors")
    write_preset(ctx.root, "with_lora", loras=["own.safetensors"], loras_multipliers=[0.25])
    ctx.refresh_presets()

    image = ctx.session.generate("with_lora", order(ctx, "with_lora", activated_loras=["users.safetensors"])).images[0]

    assert handler.processors[0].loras == [("own.safetensors", 0.25), ("users.safetensors", 1.0)]
    assert image.record["activated_loras"] == ["users.safetensors"]


def test_loras_are_changed_only_when_they_differ_and_taken_off_at_the_end(
    ctx: AppContext, handler: FakeHandler
) -> None:
    write_weights(ctx.root / "lora_root" / "fake" / "a.safetensors")
    for loras in (["a.safetensors"], ["a.safetensors"], []):
        ctx.session.generate("one", order(ctx, activated_loras=loras))

    assert handler.processors[0].lora_loads == 2
    assert handler.processors[0].loras == []


def test_a_lora_that_is_nowhere_is_an_error_before_loading(ctx: AppContext, handler: FakeHandler) -> None:
    write_weights(ctx.root / "lora_root" / "fake" / "watercolour.safetensors")

    with pytest.raises(UserError, match="watercolor") as caught:
        ctx.session.generate("one", order(ctx, activated_loras=["watercolor.safetensors"]))

    assert "watercolour.safetensors" in caught.value.hint
    assert handler.loads == []


def test_strengths_reach_the_model_as_numbers_by_phase(ctx: AppContext, handler: FakeHandler) -> None:
    write_weights(ctx.root / "lora_root" / "fake" / "a.safetensors")

    ctx.session.generate("one", order(ctx, activated_loras=["a.safetensors"], loras_multipliers="0.2,1;0"))

    assert handler.processors[0].loras == [("a.safetensors", ((0.2, 1.0), (0.0,)))]


def test_what_of_a_lora_matched_is_said_returned_and_recorded(ctx: AppContext, handler: FakeHandler) -> None:
    path = write_weights(ctx.root / "lora_root" / "fake" / "a.safetensors")
    handler.prepare = lambda processor: setattr(processor, "unmatched", ("stranger.alpha",))
    events: list[Event] = []

    result = ctx.session.generate("one", order(ctx, activated_loras=["a.safetensors"]), on_event=events.append)

    assert Status("a.safetensors: 2 of 3 keys matched; not stranger.alpha") in events
    found = {"matched": 2, "total": 3, "unmatched": ["stranger.alpha"]}
    assert result.as_dict()["loras"] == [{"file": str(path), **found}]
    assert result.images[0].record["provenance"]["loras"] == [{"file": "a.safetensors", **found}]


# ---------------------------------------------------------------------------------------- ends


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


# ---------------------------------------------------------------------------------------- downloads


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


def test_a_cancelled_download_is_a_cancelled_generation(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.app.download import DownloadCancelled

    write_preset(ctx.root, "remote", URLs=["https://huggingface.co/owner/repo/resolve/main/remote.safetensors"])
    ctx.refresh_presets()

    def ensure(address: str, **_: Any) -> Path:
        raise DownloadCancelled("stopped")

    monkeypatch.setattr(ctx.files, "ensure", ensure)

    assert ctx.session.generate("remote", order(ctx, "remote")).cancelled


# ---------------------------------------------------------------------------------------- safety of numbers


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

"""A context whose session draws plain pictures at once, or step by step when a test holds the gate."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from shared.app.download import Located
from shared.app.events import ImageDone, Status, StepDone
from shared.app.metadata import save_image
from shared.app.presets import Preset
from shared.app.schema import SETTING_KEYS
from shared.quant.errors import UserError

GATE_SECONDS = 20  # a test that forgets to open the gate fails instead of hanging


def make_preset(preset_id: str, name: str, **changes: Any) -> Preset:
    """A preset of the family "fake" with a model that knows nothing but size, steps, seed and number."""
    values: dict[str, Any] = {
        "id": preset_id, "name": name, "architecture": preset_id, "family": "fake", "description": f"What {name} does.",
        "urls": (f"file:{preset_id}.safetensors",), "modules": (), "text_encoder_urls": (), "vae_urls": (),
        "preload_urls": (), "loras": (), "companions": (), "model_def": {},
    }  # fmt: skip
    own = {"resolution": "256x256", "num_inference_steps": 4, "prompt": "a red circle"}
    settings = {key: entry.default for key, entry in SETTING_KEYS.items()} | own | changes.pop("settings", {})
    return Preset(**values | changes, settings=settings)


@dataclass
class FakeSession:
    """Yields what a real session does.

    gate: one step per release. failure: raised in `stream`. refusal: raised in `plan`. download: a
    plan's.
    """

    folder: Path
    gate: threading.Semaphore | None = None
    failure: BaseException | None = None
    refusal: UserError | None = None  # of a plan
    download: Any = None  # of a plan
    orders: list[tuple[str, Any]] = field(default_factory=list)
    cancels: int = 0
    imported_ahead: int = 0
    drawing: int = 0
    most_at_once: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def plan(self, preset: Preset, settings: Any) -> SimpleNamespace:
        if self.refusal is not None:
            raise self.refusal
        return SimpleNamespace(memory_words=f"Takes 2 GiB at {settings.width}.", download=self.download)

    def stream(self, preset: Preset, settings: Any) -> Generator[Any, None, SimpleNamespace]:
        self.orders.append((preset.id, settings))
        self._stop.clear()
        self.drawing += 1
        self.most_at_once = max(self.most_at_once, self.drawing)
        try:
            yield Status("Loading the model")
            if self.failure is not None:
                raise self.failure
            for number in range(1, settings.batch_size + 1):
                for step in range(1, settings.num_inference_steps + 1):
                    if self.gate is not None:
                        assert self.gate.acquire(timeout=GATE_SECONDS), "the test did not open the gate"
                    if self._stop.is_set():
                        return SimpleNamespace(cancelled=True)
                    yield StepDone(
                        image=number, images=settings.batch_size, step=step, steps=settings.num_inference_steps,
                        seconds_left=float(settings.num_inference_steps - step),
                    )  # fmt: skip
                yield self._picture(preset, settings, number)
            return SimpleNamespace(cancelled=False)
        finally:
            self.drawing -= 1

    def import_ahead(self, after: float = 0.0) -> None:
        self.imported_ahead += 1

    def cancel(self) -> None:
        self.cancels += 1
        self._stop.set()

    def _picture(self, preset: Preset, settings: Any, number: int) -> ImageDone:
        seed = settings.seed + number - 1
        record = settings.as_record() | {"seed": seed, "model_type": preset.id, "type": "WanGP settings"}
        path = self.folder / f"{len(self.orders)}_{number}.png"
        save_image(path, Image.new("RGB", (settings.width, settings.height), (seed % 256, 90, 140)), record)
        return ImageDone(path=path, seed=seed, record=record, image=number, images=settings.batch_size)


@dataclass
class FakePresets:
    """The part of a PresetCollection that the page uses."""

    presets: dict[str, Preset]
    problems: list[str] = field(default_factory=list)

    def get(self, preset_id: str) -> Preset:
        if preset_id not in self.presets:
            raise UserError(f"There is no preset {preset_id}.")
        return self.presets[preset_id]

    def grouped(self) -> list[tuple[str, list[Preset]]]:
        return [("Fake", list(self.presets.values()))]


class FakeContext:
    """The part of AppContext that the page uses."""

    def __init__(self, folder: Path) -> None:
        self.output_folder = folder / "outputs"
        self.output_folder.mkdir()
        self.loras = folder / "loras"
        self.args = argparse.Namespace()
        self.start_over()

    def start_over(self) -> None:
        """Forget everything that was drawn and changed."""
        for picture in self.output_folder.iterdir():
            shutil.rmtree(picture) if picture.is_dir() else picture.unlink()
        self.config: dict[str, Any] = {}
        self.files = SimpleNamespace(locate=lambda url, **_: Located(Path(url.removeprefix("file:"))))
        self.session = FakeSession(self.output_folder)
        self.saved: dict[str, dict[str, Any]] = {}
        self.on_disk = [
            make_preset("z_image_demo", "Demo"),
            make_preset(
                "guided", "Guided",
                model_def={"guidance_max_phases": 1, "flow_shift": True},
                settings={"resolution": "512x768", "num_inference_steps": 30, "guidance_scale": 4.0, "flow_shift": 6.0},
            ),
            make_preset("nag", "Fake NAG", model_def={"NAG": True}),
        ]  # fmt: skip
        self.presets = FakePresets({})
        self.refresh_presets()

    def refresh_presets(self) -> FakePresets:
        self.presets = FakePresets({preset.id: preset for preset in self.on_disk})
        return self.presets

    def lora_folder(self, preset: Preset) -> Path:
        return self.loras

    def saved_settings(self, preset: Preset) -> dict[str, Any]:
        return self.saved.get(preset.id, {})

    def save_config(self, **changes: Any) -> None:
        self.config |= changes


@pytest.fixture(scope="session", autouse=True)
def _no_stray_event_loops() -> Iterator[None]:
    """Gradio opens an event loop for each of its locks and never closes it, which pytest reports; no lock needs one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradio.utils.safe_get_lock", asyncio.Lock)
        patch.setattr("gradio.queueing.safe_get_lock", asyncio.Lock)
        patch.setattr("gradio.utils.safe_get_stop_event", asyncio.Event)
        yield


@pytest.fixture
def preset_of() -> Callable[..., Preset]:
    """A preset with the changes given, by field name."""
    return lambda **changes: make_preset(changes.pop("id", "demo"), changes.pop("name", "Demo"), **changes)


@pytest.fixture
def context(tmp_path: Path) -> FakeContext:
    return FakeContext(tmp_path)

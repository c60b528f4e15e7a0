"""A model family without a model: it obeys the handler contract and draws noise that only its seed decides."""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.app.context import AppContext
from shared.app.families import Families

FAMILY = "fake"
CHANNELS = 16  # of the latents


def write_weights(path: Path, name: str = "layer.weight", shape: Sequence[int] = (2, 2)) -> Path:
    """A real safetensors file of float32 zeros."""
    count = 1
    for side in shape:
        count *= side
    header = json.dumps({name: {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * count]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * count))
    return path


@dataclass(frozen=True)
class FakeMatch:
    """What a family says of a LoRA file that was put on."""

    file: str
    unmatched: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "matched": 2,
            "total": 2 + len(self.unmatched),
            "unmatched": list(self.unmatched),
        }


@dataclass
class FakeProcessor:
    """The pipeline object of the contract. What tests change: `on_call` and `spoil`."""

    transformer: nn.Module
    text_encoder: nn.Module
    vae: nn.Module
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _interrupt: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)  # keywords of each generate()
    loras: list[tuple[str, Any]] = field(default_factory=list)
    unmatched: tuple[str, ...] = ()  # keys of every LoRA file, besides two that match
    lora_loads: int = 0
    steps_done: int = 0
    on_call: Callable[[FakeProcessor, int], None] = lambda processor, step: None  # before each step, 0-based
    spoil: str = ""  # "latents" or "picture": NaN there
    report: dict[str, Any] = field(default_factory=dict)
    remedies: dict[str, str] = field(default_factory=dict)  # what it says it did against bad numbers

    def generate(self, *, callback: Callable[..., None] | None = None, **kwargs: Any) -> Tensor | None:
        self.calls.append(kwargs)
        steps, seed = kwargs["sampling_steps"], kwargs["seed"]
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn((CHANNELS, 1, kwargs["height"] // 8, kwargs["width"] // 8), generator=generator)
        if self.spoil == "latents":
            latents[0, 0, 0, 0] = torch.nan
        assert callback is not None
        callback(-1, None, True, steps)
        for step in range(steps):
            self.on_call(self, step)
            if self._interrupt:
                return None
            self.steps_done += 1
            callback(step, latents, False)
        if self._interrupt:
            return None
        self.report = {"forwards": steps, "seconds": {"text": 0.25, "denoise": 1.0, "decode": 0.5}, "sigmas": []}
        self.report["safer"] = dict(self.remedies)
        pixels = torch.rand((3, 1, kwargs["height"], kwargs["width"]), generator=generator) * 2 - 1
        if self.spoil == "picture":
            pixels[0, 0, 0, 0] = torch.inf
        return pixels

    def load_loras(self, files: Sequence[Path], multipliers: Sequence[Any]) -> list[FakeMatch]:
        self.lora_loads += 1
        self.loras = [(Path(file).name, strength) for file, strength in zip(files, multipliers, strict=True)]
        return [FakeMatch(str(file), self.unmatched) for file in files]


@dataclass
class FakeHandler:
    """The handler contract's methods; a host calls them on the class, this object answers just the same."""

    loads: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)  # arguments of each load_model()
    built: list[list[str]] = field(default_factory=list)  # the modules that each load_model() had to make
    processors: list[FakeProcessor] = field(default_factory=list)
    prepare: Callable[[FakeProcessor], None] = lambda processor: None  # called on each processor that is loaded

    def query_supported_types(self) -> list[str]:
        return [FAMILY]

    def query_model_family(self) -> str:
        return FAMILY

    def query_model_def(self, base_model_type: str, model_def: Mapping[str, Any]) -> dict[str, Any]:
        return {"image_outputs": True}

    def query_model_files(self, computeList: Any, base_model_type: str, model_def: Mapping[str, Any]) -> list[Any]:
        return []

    def register_lora_cli_args(self, parser: argparse.ArgumentParser, lora_root: str) -> None:
        parser.add_argument("--lora-dir-fake", default=None)

    def get_lora_dir(self, base_model_type: str, args: Any, lora_root: str) -> str:
        return getattr(args, "lora_dir_fake", None) or f"{lora_root}/fake"

    def update_default_settings(self, base_model_type: str, model_def: Any, ui_defaults: dict[str, Any]) -> None:
        ui_defaults.update(resolution="64x48", num_inference_steps=3)

    def load_model(self, *args: Any, **kwargs: Any) -> tuple[FakeProcessor, dict[str, nn.Module]]:
        self.loads.append((args, kwargs))
        given = kwargs.get("parts") or {}
        modules = {name: given.get(name) or nn.Linear(2, 2) for name in ("transformer", "text_encoder", "vae")}
        self.built.append(sorted(modules.keys() - given.keys()))
        processor = FakeProcessor(**modules)
        self.prepare(processor)
        self.processors.append(processor)
        return processor, modules


def fake_families(handler: FakeHandler) -> Families:
    return Families(handlers={FAMILY: handler}, infos={FAMILY: (1, "Fake")}, equivalents={}, compatible={})


def write_preset(root: Path, preset_id: str, folder: str = "defaults", **changes: Any) -> None:
    """A preset of the fake family with its three weights files. changes: keys of "model", and "settings"."""
    settings = changes.pop("settings", {})
    urls = {}
    for role, key in (("transformer", "URLs"), ("text_encoder", "text_encoder_URLs"), ("vae", "VAE_URLs")):
        write_weights(root / "weights" / preset_id / f"{role}.safetensors")
        urls[key] = [f"file:weights/{preset_id}/{role}.safetensors"]
    model = {"name": f"Name of {preset_id}", "architecture": FAMILY, **urls} | changes
    (root / folder).mkdir(exist_ok=True)
    (root / folder / f"{preset_id}.json").write_text(json.dumps({"model": model} | settings))


def fake_context(root: Path, handler: FakeHandler, **flags: Any) -> AppContext:
    """A context on the CPU whose program folder is `root` (see write_preset)."""
    (root / "ckpts").mkdir(exist_ok=True)
    args = argparse.Namespace(gpu="cpu", **flags)
    return AppContext.create(args, root, fake_families(handler))

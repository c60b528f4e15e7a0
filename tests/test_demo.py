"""The trained demo through the library call that the family's users write: it draws what the prompt says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.z_image import autoencoder
from models.z_image.request import GenerateRequest
from models.z_image.z_image_handler import family_handler
from models.z_image.z_image_main import model_factory
from training.checker import read_picture

DEMO = Path("models/z_image/demo")
SIZE_LIMIT = 32 * 10**6  # bytes, all parts together
RIGHT = 5  # of six; docs/demo.md has the shares on hundreds of captions


@pytest.fixture(scope="module")
def demo() -> model_factory:
    processor, modules = family_handler.load_model(
        model_filename=str(DEMO / "transformer.safetensors"),
        base_model_type="z_image",
        dtype=torch.float32,
        VAE_dtype=torch.float32,
    )
    assert modules.keys() == {"transformer", "text_encoder", "vae"}
    assert all(isinstance(m, torch.nn.Module) for m in modules.values())
    return processor


def draw(demo: model_factory, prompt: str, **settings: object) -> np.ndarray:
    """(H, W, 3) uint8."""
    request = {"input_prompt": prompt, "seed": 1, "width": 256, "height": 256, "sampling_steps": 8, **settings}
    pictures = demo.generate(**request)
    assert pictures is not None
    return ((pictures[:, 0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("settings", [{}, {"width": 384}, {"height": 384}, {"guide_scale": 2.0}], ids=str)
def test_ground_shape_and_place_are_what_the_prompt_names(demo: model_factory, settings: dict[str, object]) -> None:
    scenes = (
        ("blue", "yellow", "square", "on the left", "left"),
        ("red", "white", "circle", "at the top", "top"),
        ("green", "pink", "star", "in the middle", "centre"),
        ("yellow", "blue", "ring", "in the bottom right corner", "bottom right"),
        ("purple", "orange", "heart", "at the bottom", "bottom"),
        ("white", "red", "triangle", "in the top left corner", "top left"),
    )

    readings = [
        read_picture(draw(demo, f"a medium {colour} {kind} {words} on a {ground} background", **settings))
        for ground, colour, kind, words, _ in scenes
    ]

    seen = [reading.shapes[0] if reading.shapes else None for reading in readings]
    assert sum(r.ground == scene[0] for r, scene in zip(readings, scenes, strict=True)) >= RIGHT
    assert sum(s is not None and s.colour == scene[1] for s, scene in zip(seen, scenes, strict=True)) >= RIGHT
    assert sum(s is not None and s.kind == scene[2] for s, scene in zip(seen, scenes, strict=True)) >= RIGHT
    assert sum(s is not None and s.place == scene[4] for s, scene in zip(seen, scenes, strict=True)) >= RIGHT


def test_tiles_leave_no_seam_in_the_demo(demo: model_factory) -> None:
    request = GenerateRequest(prompt="a green star on a yellow ground", width=384, height=256)
    latents = list(demo.pipeline.denoise(request, *demo.pipeline.encode(request)))[-1].latents

    whole = autoencoder.decode(demo.vae, latents)
    tiled = autoencoder.decode(demo.vae, latents, tile=8)

    assert float((whole - tiled).abs().max()) <= 2 * 2 / 255  # pictures span 2, so 2 levels of 255


def test_every_file_is_listed_with_its_hash_and_all_are_small() -> None:
    manifest = json.loads((DEMO / "MANIFEST.json").read_text(encoding="utf-8"))
    files = {str(p.relative_to(DEMO).as_posix()): p for p in DEMO.rglob("*") if p.is_file()}
    del files["MANIFEST.json"]

    listed = {name: entry["sha256"] for name, entry in manifest["files"].items()}

    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert sum(path.stat().st_size for path in files.values()) <= SIZE_LIMIT

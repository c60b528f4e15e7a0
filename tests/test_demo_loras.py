"""The LoRA files that come with the demo, in the default LoRA folder, change the picture as their styles say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.z_image.z_image_handler import family_handler
from models.z_image.z_image_main import model_factory
from shared.ui.fields import find_loras
from training.scenes import Scene, Shape, draw_scene
from training.styles import STYLES

FOLDER = Path("lora_root/z_image")
SHIPPED = ("neon", "blueprint")
SCENES = {
    "a large blue circle in the middle of a yellow background": Scene(
        "yellow", (Shape("circle", "blue", "large", "centre"),)
    ),
    "a medium red square on the left of a white background": Scene(
        "white", (Shape("square", "red", "medium", "left"),)
    ),
}


@pytest.fixture(scope="module")
def demo() -> model_factory:
    processor, _ = family_handler.load_model(
        model_filename="models/z_image/demo/transformer.safetensors",
        base_model_type="z_image",
        dtype=torch.float32,
        VAE_dtype=torch.float32,
    )
    return processor


def draw(demo: model_factory, prompt: str) -> np.ndarray:
    """(H, W, 3) uint8."""
    pictures = demo.generate(input_prompt=prompt, seed=3, width=256, height=256, sampling_steps=8)
    assert pictures is not None
    return ((pictures[:, 0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


def difference(picture: np.ndarray, drawing: np.ndarray) -> float:
    return float(np.abs(picture.astype(int) - drawing).mean())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_picture_looks_as_the_style_draws_the_scene(demo: model_factory, name: str) -> None:
    for prompt, scene in SCENES.items():
        demo.load_loras([], [])
        plain = draw(demo, prompt)

        (match,) = demo.load_loras([FOLDER / "demo" / f"{name}.safetensors"], [1.0])

        styled = draw(demo, prompt)
        wanted, unstyled = STYLES[name].draw(scene, 256, 256), draw_scene(scene, 256, 256)
        assert match.matched == match.total
        assert difference(styled, wanted) < 0.5 * difference(styled, unstyled)
        assert difference(plain, unstyled) < 0.5 * difference(plain, wanted)


def test_the_page_offers_them() -> None:
    assert {f"demo/{name}.safetensors" for name in SHIPPED} <= set(find_loras(FOLDER))


def test_they_are_small() -> None:
    assert max(path.stat().st_size for path in (FOLDER / "demo").glob("*.safetensors")) <= 1_000_000

"""The demo's control branch through the library call: edges are followed, in the colours that the prompt asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.z_image.z_image_handler import family_handler
from models.z_image.z_image_main import model_factory
from training.judge_control import has_colours, overlap, shape_of
from training.outlines import sample_drawing
from training.train_control import edges_of
from training.train_vae import to_pixels

FILE = Path("models/z_image/demo_control/control.safetensors")
PICTURES = 5


@pytest.fixture(scope="module")
def demo() -> model_factory:
    processor, _ = family_handler.load_model(
        model_filename=["models/z_image/demo/transformer.safetensors", str(FILE)],
        base_model_type="z_image_control2_1",
        dtype=torch.float32,
        VAE_dtype=torch.float32,
    )
    return processor


def test_outlines_without_a_name_are_followed_in_the_asked_colours(demo: model_factory) -> None:
    rng = np.random.default_rng(11)
    overlaps, colours = [], 0
    for i in range(PICTURES):
        drawing = sample_drawing(rng, 256, 256, held_out=True)
        edges = to_pixels([edges_of(drawing, 256, 256, rng)])[0]
        prompt = f"a {drawing.shapes[0].colour} shape in front of a {drawing.ground} background"

        size = {"width": 256, "height": 256}
        pictures = demo.generate(
            input_prompt=prompt, seed=i, sampling_steps=8, input_frames=edges, context_scale=[1.0], **size
        )

        assert pictures is not None
        picture = ((pictures[:, 0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
        overlaps.append(overlap(shape_of(picture, drawing), drawing.shapes[0].mask(256, 256) > 0.5))
        colours += has_colours(picture, drawing)
    assert np.mean(overlaps) >= 0.8
    assert colours >= PICTURES - 1


def test_the_file_is_small() -> None:
    assert FILE.stat().st_size <= 12_000_000

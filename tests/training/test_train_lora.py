"""The LoRA that training writes is the change it trained, in a file that any program reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.z_image import lora
from models.z_image.config import TransformerConfig
from models.z_image.transformer import ZImageTransformer
from shared.quant.checkpoint import Checkpoint
from training import train_lora
from training.resume import DEMO
from training.styles import STYLES
from training.train_flow import TRANSFORMER_CONFIG, initialise
from training.train_lora import add_branches, describe, held_out, nearest, share_of_rate, to_file

SMALL = TransformerConfig(
    dim=64, n_heads=2, n_layers=2, n_refiner_layers=1, cap_feat_dim=32, ffn_dim=96, axes_dims=(8, 12, 12)
)


def small_transformer() -> ZImageTransformer:
    torch.manual_seed(0)
    transformer = ZImageTransformer(SMALL)
    initialise(transformer)
    torch.nn.init.normal_(transformer.final_layer.linear.weight, std=0.1)  # or every answer would be zero
    return transformer.requires_grad_(False)


def answer(transformer: ZImageTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 8, 8, generator=generator)
    captions = [torch.randn(5, 32, generator=generator), torch.randn(7, 32, generator=generator)]
    return transformer(latents, torch.tensor([0.2, 0.7]), captions)


@torch.no_grad()
def test_branches_change_nothing_before_training() -> None:
    transformer = small_transformer()
    before = answer(transformer)

    add_branches(transformer, rank=2)

    torch.testing.assert_close(answer(transformer), before)


@torch.no_grad()
def test_the_file_does_what_the_trained_branches_did(tmp_path: Path) -> None:
    transformer = small_transformer()
    before = answer(transformer)
    branches = add_branches(transformer, rank=2)
    for parameter in branches.parameters():
        parameter.copy_((parameter + 0.3 * torch.randn(parameter.shape)).to(torch.bfloat16))
    trained = answer(transformer)
    path = tmp_path / "style.safetensors"
    save_file(to_file(branches), path, metadata=describe(STYLES["neon"], 2, 10))

    fresh = small_transformer()
    (match,) = lora.apply(fresh, [lora.read(path)], [1.0])

    assert match.matched == match.total
    assert float((trained - before).abs().max()) > 0.1
    torch.testing.assert_close(answer(fresh), trained, rtol=1e-4, atol=1e-4)


def test_the_file_is_named_as_diffusers_names_layers_and_is_small() -> None:
    transformer = ZImageTransformer(TRANSFORMER_CONFIG)
    tensors = to_file(add_branches(transformer, rank=8))

    assert {name.split(".")[0] for name in tensors} == {"diffusion_model"}
    assert tensors["diffusion_model.layers.2.attention.to_k.lora_A.weight"].shape == (8, 384)
    assert tensors["diffusion_model.noise_refiner.0.feed_forward.w3.lora_B.weight"].shape == (1024, 8)
    assert float(tensors["diffusion_model.layers.0.attention.to_out.0.alpha"]) == 8
    assert not any("context_refiner" in name for name in tensors)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) < 1_000_000


def arguments(folder: Path, **others: Any) -> argparse.Namespace:
    given: dict[str, Any] = {
        "style": "neon", "steps": 4, "rank": 2, "rate": 1e-2, "batch": 2, "pictures": 12, "seed": 0, "save_every": 2,
        "start_from": None, "compile": False, "demo": DEMO, "work": folder, "output": folder, "count": 4,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **others})


# torch remarks, once in a process, that norms in bfloat16 have float32 weights under autocast
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_lora, "SIZE", (64, 64))
    train_lora.train(arguments(tmp_path / "whole"))
    original, calls = train_lora.flow_loss, []

    def interrupted(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*given, **named)

    monkeypatch.setattr(train_lora, "flow_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_lora.train(arguments(tmp_path / "parts"))
    train_lora.train(arguments(tmp_path / "parts"))

    whole, parts = (Checkpoint.open(tmp_path / name / "neon.safetensors") for name in ("whole", "parts"))
    wanted, found = whole.load(), parts.load()
    assert len(calls) == 6  # the run that was cut off after 3 went on from 2
    assert all(bool(tensor.any()) for name, tensor in wanted.items() if "lora_B" in name)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor)
    assert whole.metadata["ss_network_dim"] == "2"


def test_rate_rises_quickly_stays_and_falls_to_zero() -> None:
    shares = [share_of_rate(step, 400) for step in (0, 19, 199, 300, 400)]

    assert shares == pytest.approx([0.05, 1.0, 1.0, 0.5, 0.0])


def test_nearest_measures_every_pair() -> None:
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)

    assert nearest([black, white], [white, white, black]).tolist() == [[255, 255, 0], [0, 0, 255]]


def test_captions_to_judge_with_mention_everything() -> None:
    scenes, captions = held_out(8)

    assert all(caption.is_complete for caption in captions)
    assert sorted(len(scene.shapes) for scene in scenes) == [1, 1, 1, 1, 1, 1, 2, 2]

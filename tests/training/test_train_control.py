"""What the control branch is shown in training is what users show it, and the file is one that programs know."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from models.z_image.config import SEQUENCE_MULTIPLE
from models.z_image.control import ControlSignal
from models.z_image.control_config import release_of
from models.z_image.control_loader import load_control, plan_control, read_control_config
from models.z_image.text_encoder import load_tokenizer
from models.z_image.transformer import ZImageTransformer
from shared.quant.assemble import Storage
from shared.quant.checkpoint import Checkpoint
from training import train_control
from training.captions import KIND_WORDS, PLACE_WORDS
from training.outlines import Drawing, sample_drawing
from training.patch_code import load_patch_code
from training.resume import DEMO
from training.scenes import COLOURS, sample_scene
from training.train_control import (
    CONFIG,
    EDGES,
    HOLE,
    edges_of,
    grow_branch,
    hide,
    make_pool,
    sample_hole,
    word_colours,
    word_example,
    write_file,
)
from training.train_flow import TRANSFORMER_CONFIG, initialise


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(DEMO / "text_encoder")


@pytest.fixture(scope="module")
def trunk() -> ZImageTransformer:
    torch.manual_seed(0)
    transformer = ZImageTransformer(TRANSFORMER_CONFIG)
    initialise(transformer)
    torch.nn.init.normal_(transformer.final_layer.linear.weight, std=0.1)  # or every answer would be zero
    return transformer.requires_grad_(False)


@torch.no_grad()
def test_a_new_branch_leaves_the_drawing_alone_and_a_taught_one_does_not(trunk: ZImageTransformer) -> None:
    latents, context = torch.randn(1, 16, 8, 8), torch.randn(1, 33, 8, 8)
    captions, time = [torch.randn(5, 256)], torch.tensor([0.3])
    plain = trunk(latents, time, captions)

    trunk.control = branch = grow_branch(trunk)
    steered = trunk(latents, time, captions, ControlSignal(context, 1.0))
    torch.nn.init.normal_(branch.layers[0].after_proj.weight, std=0.02)
    taught = trunk(latents, time, captions, ControlSignal(context, 1.0))
    trunk.control = None

    torch.testing.assert_close(steered, plain)
    assert float((taught - plain).abs().max()) > 1e-3


def test_the_file_is_a_small_fun_controlnet_2_1_that_loads(trunk: ZImageTransformer, tmp_path: Path) -> None:
    branch = grow_branch(trunk)
    path = tmp_path / "control.safetensors"

    write_file(branch, path)

    checkpoint = Checkpoint.open(path)
    config = read_control_config(checkpoint, plan_control(checkpoint), TRANSFORMER_CONFIG.n_layers)
    assert checkpoint.nbytes <= 12_000_000
    assert {"control_all_x_embedder.2-1.weight", "control_layers.0.attention.to_q.weight"} <= set(checkpoint.tensors)
    # a file whose after_proj were all zero would be taken for a 2.0, so the trained refiner must speak
    torch.nn.init.normal_(branch.noise_refiner[0].after_proj.weight)
    write_file(branch, path)
    checkpoint = Checkpoint.open(path)
    config = read_control_config(checkpoint, plan_control(checkpoint), TRANSFORMER_CONFIG.n_layers)
    assert config == CONFIG
    assert "2.1" in release_of(config)
    loaded = load_control(checkpoint, TRANSFORMER_CONFIG, Storage(dtype=torch.float32))
    torch.testing.assert_close(
        loaded.layers[0].attention.qkv.weight, branch.layers[0].attention.qkv.weight.to(torch.bfloat16).float()
    )


def test_edges_say_where_and_never_in_which_colour() -> None:
    drawing = sample_drawing(np.random.default_rng(3), 256, 256, held_out=False)
    exchanged = Drawing(drawing.shapes[0].colour, (replace(drawing.shapes[0], colour=drawing.ground),))

    edges = edges_of(drawing, 256, 256, np.random.default_rng(4))

    assert np.array_equal(edges, edges_of(exchanged, 256, 256, np.random.default_rng(4)))
    mask = drawing.shapes[0].mask(256, 256)
    near_edge = (mask > 0.02) & (mask < 0.98)
    assert edges[near_edge].mean() > 20 * edges[~near_edge].mean()


def test_captions_of_colours_say_nothing_else() -> None:
    rng = np.random.default_rng(0)
    others = {word for words in [*KIND_WORDS.values(), *PLACE_WORDS.values()] for phrase in words for word in [phrase]}

    for held_out in (False, True):
        for _ in range(30):
            ground, colour = rng.choice([c for c in COLOURS if c not in ("teal", "purple")], size=2, replace=False)
            text = word_colours(str(ground), str(colour), rng, held_out=held_out)
            assert str(ground) in text and str(colour) in text
            assert not [word for word in others if f" {word} " in f" {text} "]


def test_captions_fit_one_padded_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = np.random.default_rng(0)

    for _ in range(60):
        scene = sample_scene(rng, held_out=False)
        ids = word_example(scene, (scene.ground, scene.shapes[0].colour), tokenizer, rng)
        assert len(ids) <= SEQUENCE_MULTIPLE


def test_edges_and_hole_are_shown_alone_and_together() -> None:
    context = torch.ones(60, 33, 2, 2)

    shown = hide(context, np.random.default_rng(0))

    kinds = {(bool(row[EDGES].any()), bool(row[HOLE].any())) for row in shown}
    assert kinds == {(True, False), (False, True), (True, True)}
    assert bool((context == 1).all())


def test_holes_are_neither_empty_nor_everything() -> None:
    rng = np.random.default_rng(0)

    shares = [float(sample_hole(rng, 96, 64).mean()) for _ in range(30)]

    assert min(shares) > 0.05
    assert max(shares) < 0.7


def test_a_pool_holds_contexts_as_users_pictures_make_them() -> None:
    code, rng = load_patch_code(), np.random.default_rng(0)

    pool = make_pool(code, code.encode, (128, 96), 4, rng)

    assert pool.clean.shape == (4, 16, 12, 16)
    assert pool.context.shape == (4, 33, 12, 16)
    keep = pool.context[:, 16]
    assert set(np.unique(keep)) == {0.0, 1.0}
    # outside the hole the kept picture is the picture
    inner = keep[:, None].repeat(16, 1) == 1
    close = np.isclose(pool.context[:, 17:][inner], pool.clean[inner], atol=1e-2)
    assert close.mean() > 0.75  # cells on the hole's border hold some grey


def arguments(folder: Path, **others: Any) -> argparse.Namespace:
    given: dict[str, Any] = {
        "steps": 4, "rate": 1e-3, "muon_rate": 3e-3, "batch": 2, "pictures": 9, "seed": 0, "threads": 1,
        "save_every": 2, "start_from": None, "compile": False, "demo": DEMO, "pools": folder.parent / "pools",
        "checkpoint": folder / "control.pt", "output": folder / "control.safetensors",
    }  # fmt: skip
    return argparse.Namespace(**{**given, **others})


# torch remarks, once in a process, that norms in bfloat16 have float32 weights under autocast
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_control, "SIZE", (64, 64))
    train_control.train(arguments(tmp_path / "whole"))
    original, calls = train_control.control_loss, []

    def interrupted(*given: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(train_control, "control_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_control.train(arguments(tmp_path / "parts"))
    train_control.train(arguments(tmp_path / "parts"))

    whole = Checkpoint.open(tmp_path / "whole" / "control.safetensors").load()
    parts = Checkpoint.open(tmp_path / "parts" / "control.safetensors").load()
    assert len(calls) == 6  # the run that was cut off after 3 went on from 2
    assert bool(whole["control_layers.0.after_proj.weight"].any())
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor)

"""The error-correction LoRA: its names, its place beside a file, and what it gives back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.quant.convert import Place
from shared.quant.error_lora import correction, find_beside, path_beside, tensors_of
from shared.quant.inputs import Inputs


def test_stacked_layers_get_their_own_rows_in_the_order_of_the_matrix() -> None:
    up, down = torch.arange(8.0).reshape(4, 2), torch.ones(2, 3)

    named = tensors_of(Place("net.0.proj", (1, 0), 2, ("w1", "w3")), up, down)

    assert torch.equal(named["diffusion_model.w3.lora_up.weight"], up[:2])
    assert torch.equal(named["diffusion_model.w1.lora_up.weight"], up[2:])
    assert torch.equal(named["diffusion_model.w1.lora_down.weight"], down)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (Place("attention.to_qkv", (0, 1, 2), 3, ("attention.qkv",)), "attention.qkv"),
        (Place("attention.to_k", (1,), 3, ("attention.qkv",)), "attention.to_k"),
        (Place("attention.to_out.0", (0,), 1, ("attention.out",)), "attention.out"),
    ],
)
def test_whole_layers_go_by_official_names_and_parts_by_their_own(place: Place, name: str) -> None:
    named = tensors_of(place, torch.ones(6, 2), torch.ones(2, 4))

    assert set(named) == {f"diffusion_model.{name}.lora_up.weight", f"diffusion_model.{name}.lora_down.weight"}


def test_with_inputs_it_gives_back_more_of_the_outputs() -> None:
    error, rows = torch.randn(64, 48), torch.randn(200, 48) * torch.logspace(0, 2, 48)
    inputs = Inputs(rows.square().mean(dim=0).sqrt(), rows.abs().amax(dim=0), rows)

    def left(inputs: Inputs | None) -> tuple[float, float]:
        up, down = correction(error, 8, inputs)
        rest = error - up @ down
        return float(rest.norm() / error.norm()), float((rows @ rest.t()).norm() / (rows @ error.t()).norm())

    (weights, outputs), (weights_seen, outputs_seen) = left(None), left(inputs)
    assert weights < weights_seen < 1
    assert outputs_seen < 0.7 * outputs


def test_only_pairs_in_float32_are_taken_for_one(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    beside = path_beside(model)
    key = "diffusion_model.layers.0.attention.out"
    pair = {f"{key}.lora_up.weight": torch.ones(4, 2), f"{key}.lora_down.weight": torch.ones(2, 4)}
    save_file({"weight": torch.ones(1)}, model)

    assert find_beside(model) is None
    save_file(pair, beside)
    assert find_beside(model) == beside
    save_file(pair | {f"{key}.alpha": torch.ones(())}, beside)
    assert find_beside(model) is None
    save_file({name: tensor.bfloat16() for name, tensor in pair.items()}, beside)
    assert find_beside(model) is None

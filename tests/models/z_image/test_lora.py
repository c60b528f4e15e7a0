"""LoRA files of every naming change a layer by exactly what peft's formula says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.z_image import lora
from models.z_image.loader import load_transformer
from models.z_image.transformer import ZImageTransformer
from shared.quant.errors import LayerMismatchError, UserError

RANK = 4


@pytest.fixture
def model(model_folder: Path) -> ZImageTransformer:
    return load_transformer(model_folder / "transformer.safetensors", torch.float32)


def pair(rows: int, columns: int = 384) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(RANK, columns), torch.randn(rows, RANK)


def delta_of(model: ZImageTransformer, module: str) -> torch.Tensor:
    """What the LoRAs add to a linear's weight, measured by sending the unit vectors through it."""
    linear = model.get_submodule(module)
    return (linear(torch.eye(linear.in_features)) - torch.eye(linear.in_features) @ linear.weight.T).T


SPELLINGS = {
    "peft": "transformer.layers.0.attention.to_k.lora_{}.weight",
    "peft, default adapter": "base_model.model.layers.0.attention.to_k.lora_{}.default.weight",
    "ai-toolkit": "diffusion_model.layers.0.attention.to_k.lora_{}.weight",
    "bare": "layers.0.attention.to_k.lora_{}.weight",
    "kohya": "lora_unet_layers_0_attention_to_k.lora_{}.weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("letters", [("A", "B"), ("down", "up")])
def test_every_spelling_lands_in_its_rows(
    tmp_path: Path, model: ZImageTransformer, spelling: str, letters: tuple[str, str]
) -> None:
    down, up = pair(384)
    names = [SPELLINGS[spelling].format(letter) for letter in letters]
    save_file(dict(zip(names, (down, up), strict=True)), tmp_path / "l.safetensors")

    matches = lora.apply(model, [lora.read(tmp_path / "l.safetensors")], [0.5])

    expected = torch.zeros(3 * 384, 384)
    expected[384:768] = 0.5 * up @ down
    torch.testing.assert_close(delta_of(model, "layers.0.attention.qkv"), expected, rtol=0, atol=1e-3)
    assert matches == [lora.Match(str(tmp_path / "l.safetensors"), 2, 2, ())]


def test_alpha_scales_and_parts_of_a_fused_layer_add_up(tmp_path: Path, model: ZImageTransformer) -> None:
    state, expected = {}, []
    for name in ("w1", "w3"):
        down, up = pair(1024)
        base = f"diffusion_model.noise_refiner.0.feed_forward.{name}"
        state |= {
            f"{base}.lora_down.weight": down,
            f"{base}.lora_up.weight": up,
            f"{base}.alpha": torch.tensor(2.0),
        }
        expected.append(2.0 / RANK * up @ down)
    save_file(state, tmp_path / "l.safetensors")

    lora.apply(model, [lora.read(tmp_path / "l.safetensors")], [1.0])

    torch.testing.assert_close(
        delta_of(model, "noise_refiner.0.feed_forward.w13"), torch.cat(expected), rtol=0, atol=1e-3
    )


def test_fused_files_and_several_files_at_once(tmp_path: Path, model: ZImageTransformer) -> None:
    expected = torch.zeros(3 * 384, 384)
    for i, strength in enumerate((1.0, -0.3)):
        down, up = pair(3 * 384)
        base = "diffusion_model.layers.1.attention.qkv"
        save_file({f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}, tmp_path / f"{i}.safetensors")
        expected += strength * up @ down

    lora.apply(model, [lora.read(tmp_path / f"{i}.safetensors") for i in range(2)], [1.0, -0.3])

    torch.testing.assert_close(delta_of(model, "layers.1.attention.qkv"), expected, rtol=0, atol=1e-3)


def test_taking_loras_off_restores_the_model_exactly(tmp_path: Path, model: ZImageTransformer) -> None:
    down, up = pair(384)
    base = "transformer.layers.0.attention.to_out.0"
    save_file({f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}, tmp_path / "l.safetensors")
    x = torch.randn(3, 384)
    before = model.layers[0].attention.out(x)

    lora.apply(model, [lora.read(tmp_path / "l.safetensors")], [1.0])
    during = model.layers[0].attention.out(x)
    lora.apply(model, [], [])

    assert not torch.allclose(before, during)
    assert torch.equal(model.layers[0].attention.out(x), before)


def test_a_lora_for_another_model_is_an_error(tmp_path: Path, model: ZImageTransformer) -> None:
    down, up = pair(16, 16)
    base = "transformer.single_transformer_blocks.0.attn.to_q"
    save_file({f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}, tmp_path / "flux.safetensors")

    with pytest.raises(
        UserError,
        match=r"0 of its 2 keys belong to a Z-Image model.*single_transformer.*It looks like a LoRA for FLUX.1",
    ):
        lora.apply(model, [lora.read(tmp_path / "flux.safetensors")], [1.0])


def test_unmatched_modules_are_reported(tmp_path: Path, model: ZImageTransformer) -> None:
    state = {}
    for base in ("transformer.layers.0.attention.to_q", "transformer.layers.99.attention.to_q"):
        down, up = pair(384)
        state |= {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}
    save_file(state, tmp_path / "l.safetensors")

    match = lora.apply(model, [lora.read(tmp_path / "l.safetensors")], [1.0])[0]

    lost = tuple(name for name in sorted(state) if "layers.99" in name)
    assert (match.matched, match.total, tuple(sorted(match.unmatched))) == (2, 4, lost)


def test_a_matrix_of_another_size_names_both(tmp_path: Path, model: ZImageTransformer) -> None:
    down, up = pair(384, 3840)
    base = "transformer.layers.0.attention.to_q"
    save_file({f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}, tmp_path / "l.safetensors")

    with pytest.raises(LayerMismatchError, match=r"takes 384 numbers and gives 384 here; the file's takes 3840"):
        lora.apply(model, [lora.read(tmp_path / "l.safetensors")], [1.0])


def test_a_host_gets_the_same_change_under_our_fused_names(model: ZImageTransformer) -> None:
    state, expected = {"text_encoder.stranger": torch.zeros(1)}, torch.zeros(3 * 384, 384)
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        down, up = pair(384)
        base = f"lora_unet_layers_0_attention_{name}"
        state |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up, f"{base}.alpha": torch.tensor(1.0)}
        expected[i * 384 : (i + 1) * 384] = up @ down / RANK

    fused = model.preprocess_loras("z_image", state)

    down, up = (fused[f"diffusion_model.layers.0.attention.qkv.lora_{letter}.weight"] for letter in "AB")
    torch.testing.assert_close(up @ down, expected, rtol=0, atol=1e-4)
    assert fused.keys() - state.keys() == {f"diffusion_model.layers.0.attention.qkv.lora_{c}.weight" for c in "AB"}
    assert "text_encoder.stranger" in fused

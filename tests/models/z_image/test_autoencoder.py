"""The VAE against diffusers' own object, and what its files may say and lack."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from models.z_image import autoencoder
from models.z_image.cpu_attention import multiplies_bfloat16
from models.z_image.quick_decoder import quick_decoder
from models.z_image.vae_numbers import computed_in
from shared.quant.errors import CheckpointError, LayerMismatchError
from shared.quant.mapping import is_mapped


def decoded(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    z = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(z, return_dict=False)[0].clamp(-1, 1)


def test_decodes_and_encodes_like_diffusers(model_folder: Path, reference_vae: AutoencoderKL) -> None:
    vae = autoencoder.load_vae(model_folder / "vae", torch.float32)
    latents, picture = torch.randn(2, 16, 6, 4), torch.rand(1, 3, 32, 48) * 2 - 1

    expected = (reference_vae.encode(picture).latent_dist.mode() - 0.2) * 0.4

    torch.testing.assert_close(autoencoder.decode(vae, latents), decoded(reference_vae, latents), rtol=0, atol=1e-4)
    torch.testing.assert_close(autoencoder.encode(vae, picture), expected, rtol=0, atol=1e-5)


@pytest.fixture
def half_vae(model_folder: Path, tmp_path: Path) -> Path:
    """The same VAE in bfloat16, as the published one is."""
    shutil.copytree(model_folder / "vae", tmp_path / "half")
    file = tmp_path / "half" / "diffusion_pytorch_model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file)
    return file.parent


def test_numbers_of_another_type_stay_in_the_file_until_their_part_is_used(half_vae: Path) -> None:
    at_once = autoencoder.load_vae(half_vae, torch.float32)
    later = autoencoder.load_vae(half_vae, torch.float32, keep_mapped=True)
    latents, picture = torch.randn(2, 16, 6, 4), torch.rand(1, 3, 32, 48) * 2 - 1
    assert all(is_mapped(weight) and weight.dtype == torch.bfloat16 for weight in later.parameters())
    assert computed_in(later) == computed_in(at_once) == torch.float32

    assert torch.equal(autoencoder.encode(later, picture), autoencoder.encode(at_once, picture))
    assert all(is_mapped(weight) for weight in later.decoder.parameters()), "nothing has been decoded"
    assert torch.equal(autoencoder.decode(later, latents), autoencoder.decode(at_once, latents))
    assert torch.equal(autoencoder.decode(later, latents, tile=4), autoencoder.decode(at_once, latents, tile=4))
    assert {weight.dtype for weight in later.parameters()} == {torch.float32}


@pytest.mark.skipif(not multiplies_bfloat16(), reason="no copy of the decoder on this CPU")
def test_a_quick_decoder_is_made_of_numbers_that_stay_in_the_file(half_vae: Path) -> None:
    at_once = autoencoder.load_vae(half_vae, torch.float32)
    later = autoencoder.load_vae(half_vae, torch.float32, keep_mapped=True)
    latents = torch.randn(1, 16, 6, 4)

    ours, expected = (autoencoder.decode(vae, latents, quick=quick_decoder(vae)) for vae in (later, at_once))

    assert torch.equal(ours, expected)
    assert all(is_mapped(weight) for weight in later.decoder.parameters())


def test_wan2gp_s_config_beside_the_file_is_used(model_folder: Path, tmp_path: Path) -> None:
    shutil.copy(model_folder / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "My_VAE.safetensors")
    config = {"scaling_factor": 0.9, "shift_factor": -0.1, "norm_num_groups": 4}
    (tmp_path / "My_VAE_config.json").write_text(json.dumps(config))

    vae = autoencoder.load_vae(tmp_path / "My_VAE.safetensors", torch.float32)

    assert (vae.config.scaling_factor, vae.config.shift_factor, vae.config.norm_num_groups) == (0.9, -0.1, 4)


def test_the_header_of_a_checkpoint_comes_before_a_config_beside_it(model_folder: Path, tmp_path: Path) -> None:
    state = load_file(model_folder / "vae" / "diffusion_pytorch_model.safetensors")
    said = json.dumps({"scaling_factor": 0.5, "shift_factor": 0, "norm_num_groups": 2})
    save_file({f"vae.{name}": t for name, t in state.items()}, tmp_path / "all.safetensors", {"vae_config": said})
    (tmp_path / "config.json").write_text(json.dumps({"scaling_factor": 0.9, "norm_num_groups": 4}))

    vae = autoencoder.load_vae(tmp_path / "all.safetensors", torch.float32)

    assert (vae.config.scaling_factor, vae.config.shift_factor, vae.config.norm_num_groups) == (0.5, 0, 2)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('{"scaling_factor": 0', "vae_config in its header: not readable JSON"),
        ("[" * 9000, "vae_config in its header: not readable JSON"),
        ('{"scaling_factor": ' + 5000 * "1" + "}", "vae_config in its header: not readable JSON"),
        ('{"scaling_factor": 0}', "vae_config in its header: scaling_factor is 0"),
        ('{"scaling_factor": NaN}', "scaling_factor is nan"),
        ('{"scaling_factor": 1' + 400 * "0" + "}", "scaling_factor is 1"),
        ('{"scaling_factor": 0.4, "shift_factor": "0.1"}', "shift_factor is '0.1'"),
        ('{"scaling_factor": 0.4, "norm_num_groups": 0}', "norm_num_groups is 0"),
        ('{"scaling_factor": 0.4, "norm_num_groups": 4.0}', r"norm_num_groups is 4\.0"),
        ('{"scaling_factor": 0.4, "norm_num_groups": 3}', "norms of 3 groups do not fit"),
    ],
)
def test_a_config_that_cannot_be_is_named(model_folder: Path, tmp_path: Path, said: str, message: str) -> None:
    state = load_file(model_folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "vae.safetensors", {"vae_config": said})

    with pytest.raises(CheckpointError, match=message):
        autoencoder.load_vae(tmp_path / "vae.safetensors", torch.float32)


def test_without_a_config_the_published_numbers_hold(tmp_path: Path) -> None:
    published = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32), latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    save_file(published.state_dict(), tmp_path / "vae.safetensors")

    vae = autoencoder.load_vae(tmp_path / "vae.safetensors", torch.bfloat16)

    assert (vae.config.scaling_factor, vae.config.shift_factor, vae.config.norm_num_groups) == (
        0.3611,
        0.1159,
        32,
    )
    assert next(vae.parameters()).dtype == torch.bfloat16


def ldm(state: dict[str, torch.Tensor], last: int) -> dict[str, torch.Tensor]:
    """A diffusers state dict under ldm's names, attention matrices as 1x1 convolutions."""
    result = {}
    for name, tensor in state.items():
        if re.search(r"attentions\.0\.to_.*weight", name):
            tensor = tensor[:, :, None, None]
        name = re.sub(r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{last - int(m[1])}", name)
        for theirs, ours in (
            ("down_blocks", "down"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
            ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"), ("resnets", "block"),
            ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_out.0", "proj_out"),
            ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
        ):  # fmt: skip
            name = name.replace(theirs, ours)
        result[name] = tensor.contiguous()
    return result


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_ldm_naming_gives_the_same_vae(model_folder: Path, tmp_path: Path, prefix: str) -> None:
    state = load_file(model_folder / "vae" / "diffusion_pytorch_model.safetensors")
    theirs = ldm(state, last=3)
    save_file({prefix + n: t for n, t in theirs.items()}, tmp_path / "ae.safetensors")
    (tmp_path / "ae_config.json").write_text('{"scaling_factor": 0.4, "shift_factor": 0.2, "norm_num_groups": 4}')

    vae = autoencoder.load_vae(tmp_path / "ae.safetensors", torch.float32)

    converted = convert_ldm_vae_checkpoint(theirs, {"down_block_types": range(4), "up_block_types": range(4)})
    assert converted.keys() == state.keys(), "the test's own ldm file is what diffusers takes for one"
    assert all(torch.equal(vae.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_vae_with_a_missing_tensor_is_refused(model_folder: Path, tmp_path: Path) -> None:
    state = load_file(model_folder / "vae" / "diffusion_pytorch_model.safetensors")
    del state["decoder.conv_out.bias"]
    save_file(state, tmp_path / "vae.safetensors")

    with pytest.raises(LayerMismatchError, match=r"1 tensors missing or of another shape \(decoder\.conv_out\.bias\)"):
        autoencoder.load_vae(tmp_path / "vae.safetensors", torch.float32)


def test_a_transformer_is_no_vae(model_folder: Path) -> None:
    with pytest.raises(LayerMismatchError, match="not an AutoencoderKL"):
        autoencoder.load_vae(model_folder / "transformer.safetensors", torch.float32)

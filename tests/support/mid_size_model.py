"""A Z-Image of random weights between the tests' tiny one and the real one, laid out as a preset below a folder.

Large enough that weights and activations, not the program, decide the memory it takes; small enough to draw in seconds.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3Model

from models.z_image.config import TransformerConfig
from models.z_image.transformer import ZImageTransformer
from tests.support.tiny_model import randomise

PROGRAM = Path(__file__).parents[2]
DEMO = PROGRAM / "models" / "z_image" / "demo"


def write_preset(root: Path, *, width: int = 1152, layers: int = 6, vae_channels: int = 64) -> str:
    """Weights in bfloat16 and a preset for them below `root`; returns its id. width: a multiple of 128."""
    torch.manual_seed(0)
    config = TransformerConfig(
        dim=width, n_layers=layers, n_refiner_layers=1, n_heads=width // 128, cap_feat_dim=512, ffn_dim=width * 8 // 3
    )
    folder = root / "weights"
    (folder / "text_encoder").mkdir(parents=True)
    transformer = ZImageTransformer(config)
    for parameter in transformer.parameters():
        scale = 1 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 1.0
        parameter.data.normal_(0, 0.5 * scale)
    save_file(_bf16(transformer), folder / "transformer.safetensors")
    tokens = json.loads((DEMO / "text_encoder" / "config.json").read_text())["vocab_size"]
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=tokens, hidden_size=512, intermediate_size=2048, num_hidden_layers=9, num_attention_heads=4,
            num_key_value_heads=2, head_dim=128, tie_word_embeddings=True,
        )
    )  # fmt: skip
    save_file({f"model.{name}": t for name, t in _bf16(encoder).items()}, folder / "text_encoder" / "model.safetensors")
    for file in (DEMO / "text_encoder").iterdir():
        if file.name.startswith("token") or file.suffix == ".jinja":
            shutil.copy(file, folder / "text_encoder")
    channels = (vae_channels, 2 * vae_channels, 4 * vae_channels, 4 * vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels, layers_per_block=2, latent_channels=16, norm_num_groups=32,
        scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    randomise(vae, 3).save_pretrained(folder / "vae")
    model = {
        "name": "Mid-size", "architecture": "z_image", "description": "",
        "URLs": ["file:weights/transformer.safetensors"],
        "text_encoder_URLs": ["file:weights/text_encoder/model.safetensors"],
        "text_encoder_folder": "file:weights/text_encoder",
        "VAE_URLs": ["file:weights/vae/diffusion_pytorch_model.safetensors"],
    }  # fmt: skip
    (root / "defaults").mkdir()
    preset = {"model": model, "resolution": "512x512", "num_inference_steps": 1, "guidance_scale": 0}
    (root / "defaults" / "mid_size.json").write_text(json.dumps(preset))
    return "mid_size"


def _bf16(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().bfloat16().contiguous() for name, tensor in module.state_dict().items()}

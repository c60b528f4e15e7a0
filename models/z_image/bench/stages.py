"""What stands before and behind the network: the text encoder, the VAE's decoder."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.z_image import autoencoder
from models.z_image.banded_decoder import BandedDecoder
from models.z_image.bench.stand import Stand
from models.z_image.bench.twins import randomise
from models.z_image.quick_decoder import quick_decoder
from models.z_image.text_encoder import TRAINED_TOKENS, TextEncoder, load_text_encoder

# Qwen3-4B (Qwen/Qwen3-4B config.json). A row of the vocabulary is only looked up: a short one is as fast.
QWEN3 = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 4096,
}  # fmt: skip
QWEN3_LAYERS = 36

# The published VAE (Flux's): diffusers' config.json.
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip


def text_on_cpu(stand: Stand, sizes: dict[str, Any] | None = None, layers: int = 2) -> None:
    """Two layers of real width beside the same two as diffusers' pipeline runs them, padded to 512 tokens.

    Both run the same number of layers; that the pipeline also runs the encoder's last one for nothing is not counted.
    """
    _text(stand, sizes or QWEN3, layers, (100,), "100 tokens")


def text_on_gpu(stand: Stand, sizes: dict[str, Any] | None = None, layers: int = QWEN3_LAYERS - 1) -> None:
    _text(stand, sizes or QWEN3, layers, (20, 100, 512), "")


def _text(stand: Stand, sizes: dict[str, Any], layers: int, lengths: tuple[int, ...], name: str) -> None:
    theirs, path = _qwen3(sizes, layers, stand)
    model = load_text_encoder(path, torch.bfloat16).to(stand.device)
    for length in lengths:
        encoder, ids = _encoder(model, sizes, length)
        ours, peer = _ours_anew(encoder, stand.device), _padded(theirs, ids, layers, stand.device)
        contenders: dict[str, Callable[[], Tensor]] = {"ours": ours, "P1": peer}
        if not name:
            contenders["ours known prompt"] = partial(_first, encoder, stand.device)
        stand.compare(name or f"{length} tokens", contenders, reference="P1")


def encoders(
    stand: Stand, sizes: dict[str, Any], layers: int, length: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Our encoder of a prompt of `length` tokens and the peer's, of the same weights: features (length, width)."""
    theirs, path = _qwen3(sizes, layers, stand)
    encoder, ids = _encoder(load_text_encoder(path, torch.bfloat16).to(stand.device), sizes, length)
    return _ours_anew(encoder, stand.device), _padded(theirs, ids, layers, stand.device)


def _encoder(model: nn.Module, sizes: dict[str, Any], length: int) -> tuple[TextEncoder, Tensor]:
    ids = torch.arange(length) % sizes["vocab_size"]
    return TextEncoder(model, _Tokens(ids.tolist())), ids  # type: ignore[arg-type]


def _first(encoder: TextEncoder, device: torch.device) -> Tensor:
    return encoder.encode(["a prompt"], device)[0]


def _ours_anew(encoder: TextEncoder, device: torch.device) -> Callable[[], Tensor]:
    def encode() -> Tensor:
        encoder.forget()
        return _first(encoder, device)

    return encode


def _padded(theirs: nn.Module, ids: Tensor, layers: int, device: torch.device) -> Callable[[], Tensor]:
    """Source: diffusers 0.42.1 pipeline_z_image.py, _encode_prompt."""
    padded = torch.zeros(1, TRAINED_TOKENS, dtype=torch.int64, device=device)
    padded[0, : len(ids)] = ids
    mask = torch.arange(TRAINED_TOKENS, device=device)[None] < len(ids)

    def encode() -> Tensor:
        states = theirs(input_ids=padded, attention_mask=mask, output_hidden_states=True).hidden_states
        features: Tensor = states[layers][0, : len(ids)]
        return features

    return encode


def _qwen3(sizes: dict[str, Any], layers: int, stand: Stand) -> tuple[nn.Module, Path]:
    """The peer's encoder of `layers` layers and a norm, and a file of one layer more, which ours leaves out."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        **sizes, num_hidden_layers=layers + 1, rms_norm_eps=1e-6, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    model = Qwen3Model(config).to(torch.bfloat16).eval().requires_grad_(False)
    randomise(model, 2)
    path = stand.folder / "text_encoder.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, path)
    model.layers = model.layers[:layers]
    model.norm = nn.Identity()
    return model.to(stand.device), path


class _Tokens:
    """A tokenizer that gives the same tokens whatever it is asked."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.ids}


def decode_on_cpu(stand: Stand, config: dict[str, Any] | None = None, side: int = 128) -> None:
    """Ours in float32 (precision "exact") and as precision "fast" has it, and diffusers' in float32 and bf16."""
    path, theirs = _vae(stand, config or VAE)
    latents = torch.randn(1, 16, side // 8, side // 8, generator=torch.Generator().manual_seed(3))
    vae = autoencoder.load_vae(path, torch.float32)
    contenders: dict[str, Callable[[], Any]] = {"ours float32": partial(autoencoder.decode, vae, latents)}
    quick = quick_decoder(vae)
    if quick is None:
        stand.note("This CPU has no bfloat16 arithmetic: fast and exact decode alike.")
    else:
        contenders["ours fast"] = partial(autoencoder.decode, vae, latents, 0, quick)
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        if stand.wants("P1"):
            contenders[f"P1 {name}"] = _their_decode(theirs, dtype, latents)
    reference = _their_decode(theirs, torch.float32, latents)()
    levels = {who: {"mean_levels_of_255": _levels(work(), reference)} for who, work in contenders.items()}
    stand.compare(f"{side}x{side}", contenders, reference=reference, facts=levels)


def decode_on_gpu(
    stand: Stand, config: dict[str, Any] | None = None, sides: tuple[int, ...] = (512, 1024, 2048), tile: int = 64
) -> None:
    """Ours as precision "fast" has it, in one piece, in bands and in tiles of `tile` cells, and as "exact" has it;
    diffusers' in both types, in one piece and in tiles as large."""
    path, theirs = _vae(stand, config or VAE)
    exact = autoencoder.load_vae(path, torch.float32)
    banded = BandedDecoder(exact, stand.device)
    exact, theirs = exact.to(stand.device), theirs.to(stand.device)
    for side in sides:
        latents = torch.randn(1, 16, side // 8, side // 8, generator=torch.Generator().manual_seed(3)).to(stand.device)
        contenders: dict[str, Callable[[], Any]] = {
            "ours": partial(autoencoder.decode, exact, latents, 0, banded),
            "ours in bands": partial(autoencoder.decode, exact, latents, side // 8, banded),
            "ours tiled": partial(autoencoder.decode, exact, latents, tile, banded),
            "ours float32": partial(autoencoder.decode, exact, latents),
        }
        for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
            contenders[f"P1 {name}"] = _their_decode(theirs, dtype, latents)
            contenders[f"P1 {name} tiled"] = _their_decode(theirs, dtype, latents, tile)
        reference = _their_decode(theirs, torch.float32, latents)()
        levels = {
            who: {"mean_levels_of_255": _levels(work(), reference)}
            for who, work in contenders.items()
            if stand.wants(who)
        }
        stand.compare(f"{side}x{side}", contenders, reference=reference, facts=levels, memory=True, pictures=True)


def decoders(stand: Stand, config: dict[str, Any]) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Our decoder as precision "fast" has it and the peer's in float32, as its pipeline has it, of the same weights."""
    path, theirs = _vae(stand, config)
    ours, theirs = autoencoder.load_vae(path, torch.float32), theirs.to(stand.device)
    banded = BandedDecoder(ours, stand.device)
    return lambda latents: autoencoder.decode(ours, latents, 0, banded), lambda latents: _their_picture(theirs, latents)


def _vae(stand: Stand, config: dict[str, Any]) -> tuple[Path, Any]:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(**config).eval().requires_grad_(False)
    path = stand.folder / "vae.safetensors"
    save_file(model.state_dict(), path)
    numbers = ("scaling_factor", "shift_factor", "norm_num_groups")
    path.with_name("vae_config.json").write_text(json.dumps({name: config[name] for name in numbers}), encoding="utf-8")
    return path, model


def _their_decode(theirs: Any, dtype: torch.dtype, latents: Tensor, tile: int = 0) -> Callable[[], Tensor]:
    """tile: latent cells of their own tiles, 0 for one piece."""
    vae = copy.deepcopy(theirs).to(dtype)
    if tile:
        vae.enable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = tile, 8 * tile
    return lambda: _their_picture(vae, latents)


def _their_picture(vae: Any, latents: Tensor) -> Tensor:
    """Source: diffusers 0.42.1 pipeline_z_image.py, the end of __call__."""
    z = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    picture: Tensor = vae.decode(z, return_dict=False)[0]
    return picture.float().clamp(-1, 1)


def _levels(found: Tensor, reference: Tensor) -> float:
    """Mean difference of two pictures in [-1, 1], in steps of an 8-bit file."""
    return float(f"{float((found - reference).abs().mean()) * 127.5:.3g}")

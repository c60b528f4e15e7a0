"""The VAE: diffusers' AutoencoderKL, loaded from a file's own sizes; pictures to latents and back.

Three ways back: in one piece or, where memory is short, in bands of rows (banded_decoder.py, on a GPU) and in tiles
(tiled_decoder.py); none of them shows seams.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.z_image.banded_decoder import BandedDecoder
from models.z_image.tiled_decoder import decode_tiled
from models.z_image.vae_names import CONFIG_KEY, diffusers_names
from models.z_image.vae_numbers import cast_when_used, computed_in, made_ready
from shared.quant.checkpoint import Checkpoint, TensorInfo
from shared.quant.errors import CheckpointError, LayerMismatchError, UnknownFormatError
from shared.quant.formats import PLAIN_DTYPES
from shared.quant.unfilled import unfilled

# diffusers ships no types: its modules are known by the attributes used here.
Module = Any

# Published Z-Image (Flux) VAE: scaling and shift of latents, groups of a norm. No tensor shows them.
SCALING_FACTOR = 0.3611
SHIFT_FACTOR = 0.1159
NORM_GROUPS = 32


def load_vae(path: str | Path, dtype: torch.dtype, *, keep_mapped: bool = False) -> Module:
    """Build AutoencoderKL from a checkpoint in diffusers or ldm naming, in `dtype` on the CPU, ready to run.

    Sizes come from tensor shapes; scaling, shift and norm groups from the header of a checkpoint of several parts, or a
    JSON beside the file (`config.json`, or `<name>_config.json` as Wan2GP ships it), else the published Z-Image values.
    keep_mapped: weights of another type stay in the file until encode() or decode() needs them, see vae_numbers.py.
    Raises LayerMismatchError, and CheckpointError for a config that cannot be.
    """
    from diffusers import AutoencoderKL

    checkpoint = Checkpoint.open(path)
    tensors = {name: checkpoint.tensors[given] for name, given in diffusers_names(checkpoint.tensors).items()}
    config = _sizes(checkpoint, tensors) | given_config(checkpoint)
    if any(channels % config["norm_num_groups"] for channels in config["block_out_channels"]):
        raise CheckpointError(
            f"{checkpoint.path}: norms of {config['norm_num_groups']} groups do not fit "
            f"{', '.join(map(str, config['block_out_channels']))} channels.",
            "The VAE's config.json, which says the groups, belongs beside its file.",
        )
    with unfilled():
        model = AutoencoderKL(**config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = [n for n, shape in expected.items() if n not in tensors or not _fits(tensors[n].shape, shape)]
    extra = [info.name for n, info in tensors.items() if n not in expected]
    if wrong or extra:
        raise LayerMismatchError(
            f"{checkpoint.path}: does not fit an AutoencoderKL: {len(wrong)} tensors missing or of another shape "
            f"({', '.join(wrong[:5])}), {len(extra)} unexpected ({', '.join(extra[:5])}).",
            "`wgp.py inspect FILE` says what it looks like.",
        )
    packed = [info.name for info in tensors.values() if info.dtype not in PLAIN_DTYPES]
    if packed:
        raise UnknownFormatError(
            f"{checkpoint.path}: {len(packed)} VAE tensors are packed (first: {packed[0]}).", "Use a bf16 or fp32 VAE."
        )
    for name, shape in expected.items():
        given = tensors[name].name
        weight = checkpoint.load([given])[given].reshape(shape)
        weight = weight if keep_mapped else weight.to(dtype)
        owner, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(owner), parameter, nn.Parameter(weight, requires_grad=False))
    # mmgp casts float32 weights to bfloat16 unless a model says what it is to stay in.
    model._model_dtype = dtype
    if keep_mapped:
        cast_when_used(model, dtype)
    return model.eval()


def encode(vae: Module, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] to normalised latents (B, 16, H/8, W/8) float32: the distribution's mode."""
    made_ready(vae, vae.encoder, vae.quant_conv)
    latents = vae.encode(pictures.to(computed_in(vae))).latent_dist.mode().float()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def decode(vae: Module, latents: Tensor, tile: int = 0, quick: Module | BandedDecoder | None = None) -> Tensor:
    """Normalised latents (B, 16, h, w) to pictures (B, 3, 8h, 8w) float32 in [-1, 1].

    tile: side of a tile in latent cells, 0 decodes in one piece. The two differ by rounding only. A BandedDecoder,
    which takes pictures one by one, spares memory with a tile that is no smaller than the picture.
    quick: what quick_decoder() or BandedDecoder made of the VAE, to decode with instead.
    """
    made_ready(vae, vae.post_quant_conv, vae.decoder if quick is None else None)
    z = latents.to(computed_in(vae)) / vae.config.scaling_factor + vae.config.shift_factor
    whole = not tile or max(latents.shape[-2:]) <= tile
    if isinstance(quick, BandedDecoder):
        each = [quick.prepare(one[None]) for one in z]
        pictures = [quick.decode(one, sparing=tile > 0) if whole else quick.decode_tiled(one, tile) for one in each]
        picture = torch.cat(pictures)
    elif quick is not None:
        z = _before_decoder(vae, z).to(quick.conv_in.weight.dtype)
        picture = quick(z) if whole else decode_tiled(quick, z, tile)
    else:
        picture = (
            vae.decode(z, return_dict=False)[0] if whole else decode_tiled(vae.decoder, _before_decoder(vae, z), tile)
        )
    return picture.float().clamp(-1, 1)


def _before_decoder(vae: Module, z: Tensor) -> Tensor:
    """What the decoder takes: z, after a 1x1 convolution in VAEs that have one."""
    return z if vae.post_quant_conv is None else vae.post_quant_conv(z)


def given_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Scaling, shift and norm groups, which tensors do not tell: from the header (CONFIG_KEY), a JSON beside the file.

    {} where nobody says. Raises CheckpointError for what is no JSON, and for numbers that cannot be these.
    """
    for where, text in _config_texts(checkpoint):
        try:
            said = json.loads(text)
        except (ValueError, RecursionError) as error:  # a number of 5000 digits is a ValueError
            raise CheckpointError(f"{where}: not readable JSON ({error}).") from error
        if isinstance(said, dict) and "scaling_factor" in said:
            given = {key: said[key] for key in _TOLD if said.get(key) is not None}
            for key, value in given.items():
                if not _TOLD[key](value):
                    raise CheckpointError(
                        f"{where}: {key} is {value!r}.", "The published VAE has 0.3611, 0.1159 and 32."
                    )
            return given
    return {}


def _config_texts(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Where something may be said, and what: the file's own header first."""
    if CONFIG_KEY in checkpoint.metadata:
        yield f"{checkpoint.path}: {CONFIG_KEY} in its header", checkpoint.metadata[CONFIG_KEY]
    for path in (
        checkpoint.path.with_name(f"{checkpoint.path.stem}_config.json"),
        checkpoint.path.with_name("config.json"),
    ):
        if path.is_file():
            try:
                yield str(path), path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path}: not readable JSON ({error}).") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9  # NaN is not


# What is taken of a config, and what it must be.
_TOLD: Mapping[str, Callable[[Any], bool]] = {
    "scaling_factor": lambda value: _is_number(value) and value != 0,
    "shift_factor": _is_number,
    "norm_num_groups": lambda value: _is_number(value) and isinstance(value, int) and value > 0,
}


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Equal, or ldm's 1x1 convolution where diffusers has a matrix."""
    return found == expected or (found[2:] == (1, 1) and found[:2] == expected)


def _sizes(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    shapes = {name: info.shape for name, info in tensors.items()}
    try:
        blocks = 1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("encoder.down_blocks."))
        channels = tuple(shapes[f"encoder.down_blocks.{i}.resnets.0.conv2.weight"][0] for i in range(blocks))
        layers = 1 + max(int(n.split(".")[4]) for n in shapes if n.startswith("encoder.down_blocks.0.resnets."))
        latent_channels = shapes["decoder.conv_in.weight"][1]
        if min(*channels, latent_channels) < 1:
            raise ValueError("a convolution without channels")
    except (KeyError, ValueError, IndexError) as error:
        raise LayerMismatchError(
            f"{checkpoint.path}: not an AutoencoderKL ({error}).",
            "`wgp.py inspect FILE` says what it looks like.",
        ) from error
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "latent_channels": latent_channels,
        "norm_num_groups": NORM_GROUPS if channels[0] % NORM_GROUPS == 0 else 1,
        "scaling_factor": SCALING_FACTOR,
        "shift_factor": SHIFT_FACTOR,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }

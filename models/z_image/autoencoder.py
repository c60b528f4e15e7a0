"""The VAE: diffusers' AutoencoderKL, loaded from a file's own sizes, and a tiled decode whose seams do not exist.

Why plain tiling shows seams. The decoder's 30 GroupNorms divide by the standard deviation over the *whole* picture, so
a tile of plain sky and a tile of a face are normalised differently, however much they overlap. Blending hides the edge
and keeps the error.

What is done here. A layer is finished for all tiles before the next one begins. Each norm's statistics are summed up
over all tiles first; then each tile, with one pixel of its neighbours around it, goes through norm, SiLU and 3x3
convolution. That is the untiled computation in another order, exact to rounding. Attention lives in the mid block at
1/8 of the picture's size, is cheap, and runs whole.

What it costs. Two full-size activations are stored between layers (in RAM when the model runs on a GPU), and working
memory is that of one tile: at 1024x1024 and bf16, 2 x 256 MiB stored and some 20 MiB worked on for 64-cell tiles,
where the untiled decode holds all of it and the convolution's workspace on the GPU.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.z_image.cpu_attention import multiplies_bfloat16
from models.z_image.vae_names import CONFIG_KEY, diffusers_names
from shared.quant.checkpoint import Checkpoint, TensorInfo
from shared.quant.errors import CheckpointError, LayerMismatchError, UnknownFormatError
from shared.quant.formats import PLAIN_DTYPES

# diffusers ships no types: its modules are known by the attributes used here.
Module = Any
Before = Callable[[Tensor], Tensor]
Window = tuple[slice, slice]

# Published Z-Image (Flux) VAE: scaling and shift of latents, groups of a norm. No tensor shows them.
SCALING_FACTOR = 0.3611
SHIFT_FACTOR = 0.1159
NORM_GROUPS = 32


def load_vae(path: str | Path, dtype: torch.dtype) -> Module:
    """Build AutoencoderKL from a checkpoint in diffusers or ldm naming, in `dtype` on the CPU, ready to run.

    Sizes come from tensor shapes; scaling, shift and norm groups from the header of a checkpoint of several parts, or a
    JSON beside the file (`config.json`, or `<name>_config.json` as Wan2GP ships it), else the published Z-Image values.
    Raises LayerMismatchError, and CheckpointError for a config that cannot be.
    """
    from accelerate import init_empty_weights
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
    with init_empty_weights(include_buffers=False):
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
        weight = checkpoint.load([given])[given].reshape(shape).to(dtype)
        owner, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(owner), parameter, nn.Parameter(weight, requires_grad=False))
    # mmgp casts float32 weights to bfloat16 unless a model says what it is to stay in.
    model._model_dtype = dtype
    return model.eval()


def encode(vae: Module, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] to normalised latents (B, 16, H/8, W/8) float32: the distribution's mode."""
    dtype = next(vae.parameters()).dtype
    latents = vae.encode(pictures.to(dtype)).latent_dist.mode().float()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def decode(vae: Module, latents: Tensor, tile: int = 0, quick: Module | None = None) -> Tensor:
    """Normalised latents (B, 16, h, w) to pictures (B, 3, 8h, 8w) float32 in [-1, 1].

    tile: side of a tile in latent cells, 0 decodes in one piece. The two differ by rounding only.
    quick: what quick_decoder() made of the VAE, to decode with instead.
    """
    dtype = next(vae.parameters()).dtype
    z = latents.to(dtype) / vae.config.scaling_factor + vae.config.shift_factor
    whole = not tile or max(latents.shape[-2:]) <= tile
    if quick is not None:
        z = _before_decoder(vae, z).to(quick.conv_in.weight.dtype)
        picture = quick(z) if whole else decode_tiled(quick, z, tile)
    else:
        picture = (
            vae.decode(z, return_dict=False)[0] if whole else decode_tiled(vae.decoder, _before_decoder(vae, z), tile)
        )
    return picture.float().clamp(-1, 1)


def quick_decoder(vae: Module) -> Module | None:
    """A copy of a float32 VAE's decoder that takes less than half the time: bfloat16, channels last, doubling and
    convolution in one. None where it would not.

    Its last norm and convolution stay in float32: they write the colours, and rounded ones show as bands in a smooth
    sky. The difference is 0.2 to 0.6 of 255 levels on average. For CPUs that multiply bfloat16; a GPU decodes in
    little time as it is.
    """
    weight = vae.decoder.conv_in.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not multiplies_bfloat16():
        return None
    quick: Module = copy.deepcopy(vae.decoder)
    quick.to(torch.bfloat16, memory_format=torch.channels_last)
    quick.conv_norm_out = copy.deepcopy(vae.decoder.conv_norm_out)
    quick.conv_norm_out.register_forward_pre_hook(lambda _norm, inputs: (inputs[0].float(),))
    quick.conv_out = vae.decoder.conv_out
    for block, exact in zip(quick.up_blocks, vae.decoder.up_blocks, strict=True):
        if block.upsamplers is not None:
            block.upsamplers[0] = _Doubling(block.upsamplers[0].conv, exact.upsamplers[0].conv.weight)
    for part in list(quick.modules()):
        for name, conv in part.named_children():
            if type(conv) is nn.Conv2d and conv.weight.dtype == torch.bfloat16:
                setattr(part, name, _LaidOut(conv))
    return quick


class _LaidOut(nn.Module):
    """A convolution whose weight lies as oneDNN reads it; torch would lay it out anew at every call.

    The same bits. At 128x128 pixels that takes 5 to 12 % of a convolution's time.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.out_channels = conv.out_channels
        self._how: Any = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self._how)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self._how, "none", [], "")
        return result


class _Doubling(nn.Module):
    """diffusers' Upsample2D, every pixel made four and a 3x3 convolution over these, with 16 products instead of 36.

    Of nine pixels that the convolution sees at most four are different: each of the four places in a doubled pixel has
    a 2x2 convolution of the pixels themselves, whose weights are sums of the 3x3 ones. For rows, w being the three:

        upper place:  w[0] on the row above, w[1] + w[2] on its own
        lower place:  w[0] + w[1] on its own, w[2] on the row below
    """

    def __init__(self, conv: Module, weight: Tensor) -> None:
        """conv: the convolution over doubled pixels, kept for tiles. weight: its weight (O, I, 3, 3) unrounded."""
        super().__init__()
        self.conv = conv
        sums = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=weight.dtype, device="cpu")
        phases = torch.einsum("apy,bqx,oiyx->aboipq", sums, sums, weight).flatten(0, 2)
        places = nn.Conv2d(conv.in_channels, len(phases), 2, padding=1, bias=conv.bias is not None, device="meta")
        kept = phases.to(conv.weight.dtype, memory_format=torch.channels_last)
        places.weight = nn.Parameter(kept, requires_grad=False)
        if conv.bias is not None:
            places.bias = nn.Parameter(conv.bias.repeat(4), requires_grad=False)
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        channels = self.conv.out_channels
        places: Tensor = self.places(x)
        out = torch.empty(
            (batch, channels, 2 * height, 2 * width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        for place, some in enumerate(places.split(channels, dim=1)):
            row, column = divmod(place, 2)
            out[:, :, row::2, column::2] = some[:, :, row : row + height, column : column + width]
        return out


def _before_decoder(vae: Module, z: Tensor) -> Tensor:
    """What the decoder takes: z, after a 1x1 convolution in VAEs that have one."""
    return z if vae.post_quant_conv is None else vae.post_quant_conv(z)


def decode_tiled(decoder: Module, z: Tensor, tile: int) -> Tensor:
    """diffusers' Decoder on (B, 16, h, w), layer by layer over tiles of `tile` latent cells; (B, 3, 8h, 8w)."""
    store = torch.device("cpu")
    x = decoder.mid_block(decoder.conv_in(z)).to(store)
    side = tile  # of a tile, in pixels of the activation at hand
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, side, z.device)
        for upsampler in block.upsamplers or ():
            x = _convolve(x, upsampler.conv, _upsample, side, z.device, factor=2)
            side *= 2
    last = _norm_and_silu(x, decoder.conv_norm_out, z.device)
    return _convolve(x, decoder.conv_out, last, side, z.device).to(z.device)


def _resnet(resnet: Module, x: Tensor, side: int, device: torch.device) -> Tensor:
    hidden = _convolve(x, resnet.conv1, _norm_and_silu(x, resnet.norm1, device), side, device)
    before = _norm_and_silu(hidden, resnet.norm2, device)
    out = x if resnet.conv_shortcut is None else x.new_empty(*hidden.shape)
    for window in _windows(x.shape, side):
        rows, columns = window
        skip = x[..., rows, columns].to(device)
        if resnet.conv_shortcut is not None:
            skip = resnet.conv_shortcut(skip)
        out[..., rows, columns] = (skip + _convolve_tile(hidden, resnet.conv2, before, window, 1, device)).to(
            out.device
        )
    return out


def _convolve(x: Tensor, conv: Module, before: Before, side: int, device: torch.device, factor: int = 1) -> Tensor:
    """conv(before(x)) tile by tile into one stored tensor, `factor` times as large."""
    batch, _, height, width = x.shape
    out = x.new_empty(batch, conv.out_channels, height * factor, width * factor, dtype=conv.weight.dtype)
    for window in _windows(x.shape, side):
        rows, columns = (slice(s.start * factor, s.stop * factor) for s in window)
        out[..., rows, columns] = _convolve_tile(x, conv, before, window, factor, device).to(out.device)
    return out


def _convolve_tile(
    x: Tensor, conv: Module, before: Before, window: Window, factor: int, device: torch.device
) -> Tensor:
    """One tile's result: compute with a ring of one pixel around it where there is one, then cut the ring off."""
    with_ring, cut = [], []
    for piece, length in zip(window, x.shape[-2:], strict=True):
        start = max(piece.start - 1, 0)
        with_ring.append(slice(start, min(piece.stop + 1, length)))
        offset = (piece.start - start) * factor
        cut.append(slice(offset, offset + (piece.stop - piece.start) * factor))
    tile = conv(before(x[..., with_ring[0], with_ring[1]].to(device)).to(conv.weight.dtype))
    return tile[..., cut[0], cut[1]]


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _norm_and_silu(x: Tensor, norm: nn.GroupNorm, device: torch.device) -> Before:
    """GroupNorm with the statistics of all of x, then SiLU, as a function of any crop of x."""
    batch, channels = x.shape[:2]
    groups = norm.num_groups
    total = torch.zeros(batch, groups, dtype=torch.float64, device=x.device)
    squares = torch.zeros_like(total)
    for row in range(0, x.shape[2], 64):  # bands, so that no float32 copy of all of x is made
        band = x[:, :, row : row + 64].float().reshape(batch, groups, -1)
        total += band.sum(-1, dtype=torch.float64)
        squares += band.square().sum(-1, dtype=torch.float64)
    count = x[0].numel() // groups
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).add(norm.eps).sqrt()
    per_channel = (batch, groups, channels // groups)
    mean_C = mean[..., None].expand(per_channel).reshape(batch, channels, 1, 1).float().to(device)
    deviation_C = deviation[..., None].expand(per_channel).reshape(batch, channels, 1, 1).float().to(device)

    def apply(crop: Tensor) -> Tensor:
        weight, bias = (p.to(device).float()[None, :, None, None] for p in (norm.weight, norm.bias))
        return F.silu((crop.float() - mean_C) / deviation_C * weight + bias).to(crop.dtype)

    return apply


def _windows(shape: torch.Size, side: int) -> Iterator[Window]:
    """Tiles of `side` pixels that cover the last two axes; the last of a row or column may be short."""
    height, width = shape[-2:]
    for row in range(0, height, side):
        for column in range(0, width, side):
            yield slice(row, min(row + side, height)), slice(column, min(column + side, width))


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

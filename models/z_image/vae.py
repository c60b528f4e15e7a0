"""The VAE's network: pictures to latents and back by convolutions, as in Flux, whose VAE Z-Image uses.

    encoder   conv_in, down_blocks (two resnets, then half the size), mid_block, norm, SiLU, conv_out: mean, variance
    decoder   conv_in, mid_block, up_blocks (three resnets, then twice the size), norm, SiLU, conv_out

Modules are called as in diffusers' files. Shape legend: B batch, C channels, H x W pixels of the activation at hand.
Sources: Rombach et al. 2022, arXiv 2112.10752; names and constants as in diffusers 0.42.1 AutoencoderKL.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig:
    """Sizes of one VAE. block_out_channels: of the encoder's blocks, finest first; the decoder has them reversed."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    mid_block_add_attention: bool
    use_quant_conv: bool
    use_post_quant_conv: bool


class Autoencoder(nn.Module):
    """Encoder and decoder. Latents here are the network's own; autoencoder.py scales them."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the most likely latents (B, latent, H/8, W/8): the mean, without the variance."""
        moments = self.encoder(pictures)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean: Tensor = moments.chunk(2, dim=1)[0]
        return mean

    def decode(self, z: Tensor) -> Tensor:
        """(B, latent, h, w) -> pictures (B, 3, 8h, 8w), about [-1, 1]."""
        picture: Tensor = self.decoder(self.before_decoder(z))
        return picture

    def before_decoder(self, z: Tensor) -> Tensor:
        """What the decoder takes: z, after a 1x1 convolution in VAEs that have one."""
        return z if self.post_quant_conv is None else self.post_quant_conv(z)


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = _conv3(3, channels[0])
        sizes = list(pairwise((channels[0], *channels)))
        self.down_blocks = nn.ModuleList(
            DownBlock(before, after, config, halves=index + 1 < len(sizes))
            for index, (before, after) in enumerate(sizes)
        )
        self.mid_block = MidBlock(channels[-1], config)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = _conv3(channels[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return out


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = _conv3(config.latent_channels, channels[0])
        self.mid_block = MidBlock(channels[0], config)
        sizes = list(pairwise((channels[0], *channels)))
        self.up_blocks = nn.ModuleList(
            UpBlock(before, after, config, doubles=index + 1 < len(sizes))
            for index, (before, after) in enumerate(sizes)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = _conv3(channels[-1], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        last = x.to(self.conv_out.weight.dtype)  # another type in autoencoder.quick_decoder()
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(last)))
        return out


class DownBlock(nn.Module):
    def __init__(self, before: int, after: int, config: VaeConfig, *, halves: bool) -> None:
        super().__init__()
        self.resnets = _resnets(before, after, config.layers_per_block, config)
        self.downsamplers = nn.ModuleList([Downsampler(after)] if halves else [])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers):
            x = module(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, before: int, after: int, config: VaeConfig, *, doubles: bool) -> None:
        super().__init__()
        self.resnets = _resnets(before, after, config.layers_per_block + 1, config)
        self.upsamplers = nn.ModuleList([Upsampler(after)] if doubles else [])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.upsamplers):
            x = module(x)
        return x


class Downsampler(nn.Module):
    """Half the size. The border is added below and on the right only: so the weights were trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsampler(nn.Module):
    """Twice the size: each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class MidBlock(nn.Module):
    def __init__(self, channels: int, config: VaeConfig) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, config)
        groups = config.norm_num_groups
        self.attentions = nn.ModuleList([Attention(channels, groups)] if config.mid_block_add_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.resnets
        x = first(x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = second(x)
        return out


class Resnet(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), x through a 1x1 convolution where the channels change."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, eps=NORM_EPS)
        self.conv1 = _conv3(before, after)
        self.norm2 = nn.GroupNorm(groups, after, eps=NORM_EPS)
        self.conv2 = _conv3(after, after)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        skip = x if self.conv_shortcut is None else self.conv_shortcut(x)
        out: Tensor = skip + hidden
        return out


class Attention(nn.Module):
    """Every pixel looks at every other, with one head as wide as the channels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        tokens_BNC = self.group_norm(x_BCHW).flatten(2).transpose(1, 2)
        heads = (to(tokens_BNC).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))  # (B, 1 head, N, C)
        mixed_BNC = self.to_out[0](F.scaled_dot_product_attention(*heads).squeeze(1))
        return x_BCHW + mixed_BNC.transpose(1, 2).reshape(x_BCHW.shape)


def _resnets(before: int, after: int, count: int, config: VaeConfig) -> nn.ModuleList:
    """`count` of them, the first of which changes the channels."""
    groups = config.norm_num_groups
    return nn.ModuleList(Resnet(before if index == 0 else after, after, groups) for index in range(count))


def _conv3(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)

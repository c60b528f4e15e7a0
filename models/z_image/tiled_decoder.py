"""A decode in tiles whose seams do not exist.

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

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# diffusers ships no types: its modules are known by the attributes used here.
Module = Any
Before = Callable[[Tensor], Tensor]
Window = tuple[slice, slice]

_ROWS = 64  # at a time, where numbers are widened to float32


def decode_tiled(decoder: Module, z: Tensor, tile: int) -> Tensor:
    """diffusers' Decoder on (B, 16, h, w), layer by layer over tiles of `tile` latent cells; (B, 3, 8h, 8w)."""
    middle = decoder.mid_block(decoder.conv_in(z))
    return enlarge_tiled(decoder.up_blocks, decoder.conv_norm_out, decoder.conv_out, middle, tile)


def enlarge_tiled(blocks: Iterable[Module], norm: nn.GroupNorm, conv: Module, x: Tensor, tile: int) -> Tensor:
    """What follows a decoder's mid block, on (B, C, h, w): (B, 3, 8h, 8w)."""
    device = x.device
    x = x.to("cpu")
    side = tile  # of a tile, in pixels of the activation at hand
    for block in blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, side, device)
        for upsampler in block.upsamplers or ():
            x = _convolve(x, upsampler.conv, _upsample, side, device, factor=2)
            side *= 2
    return _convolve(x, conv, _norm_and_silu(x, norm, device), side, device).to(device)


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
    for row in range(0, x.shape[2], _ROWS):
        band = x[:, :, row : row + _ROWS].float().reshape(batch, groups, -1)
        total += band.sum(-1, dtype=torch.float64)
        squares += band.square().sum(-1, dtype=torch.float64)
    count = x[0].numel() // groups
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).add(norm.eps).sqrt()
    per_channel = (batch, groups, channels // groups)
    mean_C = mean[..., None].expand(per_channel).reshape(batch, channels)
    deviation_C = deviation[..., None].expand(per_channel).reshape(batch, channels)
    weight, bias = (p.to(mean_C.device, torch.float64) for p in (norm.weight, norm.bias))
    factor, summand = weight / deviation_C, bias - mean_C / deviation_C * weight
    factor, summand = (per[..., None, None].float().to(device) for per in (factor, summand))

    def apply(crop: Tensor) -> Tensor:
        out = torch.empty_like(crop)
        for row in range(0, crop.shape[2], _ROWS):
            wide = torch.addcmul(summand, crop[:, :, row : row + _ROWS], factor)
            out[:, :, row : row + _ROWS] = F.silu(wide, inplace=True)
        return out

    return apply


def _windows(shape: torch.Size, side: int) -> Iterator[Window]:
    """Tiles of `side` pixels that cover the last two axes; the last of a row or column may be short."""
    height, width = shape[-2:]
    for row in range(0, height, side):
        for column in range(0, width, side):
            yield slice(row, min(row + side, height)), slice(column, min(column + side, width))

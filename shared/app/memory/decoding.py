"""The working memory of a decode: in one piece, in bands of rows, in tiles.

By the VAE itself, in one piece  live x numbers, of VAE bytes each
    live = 3 on a GPU: input, normalised input, output of one layer; 4.6 on a CPU, measured, whose convolutions copy
    their input and output into an order of their own; 3.5 in bfloat16, of which the last norm, in float32, takes the
    most. On a CPU the picture itself counts, too
In tiles                         live x a tile's numbers, and on a CPU 2 x the picture's, kept between layers
On a GPU in bfloat16             models/z_image/banded_decoder.py; counted, see its tests
    in one piece                 1.5 x numbers and pieces of at most 96 MiB, one and a half at once
    in bands                     0.75 x numbers and pieces of at most 24 MiB, two and a third at once
    in tiles                     3 x a tile's numbers, or what attention takes of the picture, if that is more

numbers: pixels x channels, those that enter the decoder's last stage. A second decoder counts where there is one, on a
GPU the part of it that is brought there at once.
"""

from __future__ import annotations

from shared.app.memory.sizes import MIB, ModuleSizes
from shared.app.memory.workload import Workload

TILES = (64, 32, 16)
"""Sides of decoding tiles in latent cells, from large to small, that are tried where one piece is too much."""

_CELL_PIXELS = 8
_LIVE, _LIVE_ON_CPU, _LIVE_ON_CPU_IN_BF16 = 3.0, 4.6, 3.5
_PICTURE_BYTES = 80  # per pixel on a CPU: the picture in float32, a few times over, and as 8 bits
_DECODER_SHARE = 0.6  # of a VAE's weights
_COPY_SHARE = 0.7  # of a VAE's weights in the same type: its decoder, with doublings and convolutions in one besides
_PART_SHARE = 0.1  # the same of what is brought to the GPU at once, where the copy rests in RAM
_STORED_TENSORS = 2  # a tiled decode keeps whole activations between layers
_WHOLE, _WHOLE_PIECE = 1.5, 1.5 * 96 * MIB
_BANDED, _BANDED_PIECE = 0.75, 2.33 * 24 * MIB
_TILED = 2.75
_MIDDLE, _SCORES = 0.125, 2.5  # of attention: maps of the picture's numbers, and scores in float32, so often
_SCORES_AT_ONCE = 32 * MIB


def decode_bytes(work: Workload, tile: int, vae: ModuleSizes, channels: int) -> float:
    """Of a decode in tiles of so many latent cells, 0 for one piece. channels: that enter the decoder's last stage."""
    if work.decodes_beside:
        return _beside_vae(work, tile, vae, channels)
    per_pixel = channels * (work.decode_bytes or work.vae_bytes)
    beside = vae.nbytes * _DECODER_SHARE * work.decode_bytes / work.vae_bytes if work.decode_bytes else 0.0
    beside += work.pixels * _PICTURE_BYTES if work.on_cpu else 0
    on_any_cpu = _LIVE_ON_CPU if work.decode_bytes is None else _LIVE_ON_CPU_IN_BF16
    live = on_any_cpu if work.on_cpu else _LIVE
    if not tile or work.cells <= tile:
        return live * work.pixels * per_pixel + beside
    stored = _STORED_TENSORS * work.pixels if work.on_cpu else 0  # with a GPU, whole activations are kept in RAM
    return (stored + live * _tile_pixels(work, tile)) * per_pixel + beside


def decode_ways(work: Workload) -> dict[int, str]:
    """What may be tried where one piece is too much, in words, by tile, from much memory to little."""
    tiles = {tile: f"tiles of {tile} latent cells" for tile in TILES}
    if not work.decodes_beside:
        return tiles
    # A tile as large as the picture stands for bands.
    return {work.cells: "bands of rows"} | {tile: words for tile, words in tiles.items() if tile < work.cells}


def saved_bytes(work: Workload, vae: ModuleSizes) -> float:
    """What a VAE on a GPU takes less where the other decoder has come to stay and its own one has gone."""
    if not work.decodes_beside:
        return 0.0
    assert work.decode_bytes is not None
    return vae.nbytes * (_DECODER_SHARE - _COPY_SHARE * work.decode_bytes / work.vae_bytes)


def _beside_vae(work: Workload, tile: int, vae: ModuleSizes, channels: int) -> float:
    """On a GPU, by a decoder of another type that comes to it."""
    assert work.decode_bytes is not None
    per_pixel = channels * work.decode_bytes
    numbers = work.pixels * per_pixel
    part = vae.nbytes * _PART_SHARE * work.decode_bytes / work.vae_bytes
    cells = work.pixels // _CELL_PIXELS**2
    middle = _MIDDLE * numbers + _SCORES * min(_SCORES_AT_ONCE, 4 * cells**2)
    if not tile:
        return part + max(middle, _WHOLE * numbers + min(_WHOLE_PIECE, _WHOLE * numbers))
    if tile >= work.cells:
        return part + max(middle, _BANDED * numbers + min(_BANDED_PIECE, _WHOLE * numbers))
    return part + max(middle, _TILED * _tile_pixels(work, tile) * per_pixel)


def _tile_pixels(work: Workload, tile: int) -> int:
    side = tile * _CELL_PIXELS
    return min(work.width, side) * min(work.height, side)

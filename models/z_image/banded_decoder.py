"""A GPU's decode in bands of rows: the VAE's decoder in bfloat16 with little more in memory than one activation.

Convolutions of a decoder see one row above and one below, norms see the sums of the whole picture. So a layer can be
computed band by band, when the sums have been taken while its input was written, and a band takes the last rows of the
one before along. Only whole activations stay in memory, temporaries are a band. Results lie over what they were made
from: where a convolution has passed, nobody reads its input again.

In bytes, at 1024x1024 with the published VAE:

    512x512, 512 channels            256 MiB   what comes out of the last but one doubling
    512x512, 256 channels            128       the same after a residual block: both at once, 384
    1024x1024, 256 channels          512       what comes out of the last doubling
    1024x1024, 128 channels          256       everything after it

Sparing, the widest one is never stored. It is made from the 128 MiB before it three times, band by band: for its sums,
for the first convolution behind it, and for the skip connection around that, whose 1x1 convolution is multiplied into
the doubling one's weights, which halves the third. The last residual blocks make their first convolution twice, for the
sums and for the second one, instead of storing its result. All of that is paid for by the doublings, which take 16
products instead of 36: there are no more products than in the decoder as it is written, see the tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.z_image.quick_decoder import four_places, rounded_decoder
from models.z_image.tiled_decoder import enlarge_tiled
from shared.ops import maps
from shared.ops.maps import MapOperations, eager

# diffusers ships no types: its modules are known by the attributes used here.
Module = Any
Factors = tuple[Tensor, Tensor]

MIB = 2**20
# Of one band of the widest tensor at hand; three to four such pieces are in memory at once. Few large pieces are fewer
# kernels to launch.
AMPLE_PIECE, SPARING_PIECE = 96 * MIB, 24 * MIB
_SCORES = 32 * MIB  # of attention, in float32
_COLOURS = 8  # channels of the last convolution, three of them used: kernels take numbers in eights


@dataclass(frozen=True, slots=True)
class Map:
    """An activation (H, W, C), and the sums of it for the norm that comes next."""

    numbers: Tensor
    sums: list[Tensor]


class BandedDecoder:
    """A VAE's decoder for a GPU. `decoder` is diffusers' object, rounded; see quick_decoder.py."""

    def __init__(self, vae: Module, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        """A copy of the VAE's decoder, 0.12 GB for the published one; the VAE is left as it is.

        device: where it is to lie. What is decoded on another is brought its weights part by part, and each part let
        go of before the next: no more than 0.05 GB at once, 0.02 at the fullest moment. dtype: to compute in,
        but for the last norm and convolution, which are float32.
        """
        self.decoder = rounded_decoder(vae, device, dtype)
        self.before = None if vae.post_quant_conv is None else _rebuilt(vae.post_quant_conv, device)
        self._skip = _skip_of_the_last_doubling(vae, device, dtype)
        colours = self.decoder.conv_out
        weight = F.pad(colours.weight, (0, 0, 0, 0, 0, 0, 0, _COLOURS - len(colours.weight)))
        self._colours = weight.to(memory_format=torch.channels_last), F.pad(colours.bias, (0, _COLOURS - 3))

    @property
    def device(self) -> torch.device:
        """Where it lies; what it decodes may be elsewhere."""
        device: torch.device = self.decoder.conv_in.weight.device
        return device

    def prepare(self, z: Tensor) -> Tensor:
        """What the decoder takes: z (1, 16, h, w), after a 1x1 convolution in VAEs that have one, in bfloat16."""
        if self.before is not None:
            before = _brought_to(z.device, self.before)
            z = before(z.to(before.weight.dtype))
        return z.to(self.decoder.conv_in.weight.dtype)

    def decode(self, z: Tensor, *, sparing: bool) -> Tensor:
        """z as prepare() makes it, of one picture, to (1, 3, 8h, 8w) float32.

        sparing: as in the table above; else what is computed once is stored, which takes a seventh fewer products and
        twice the memory.
        """
        walk = self._walk(z.device, SPARING_PIECE if sparing else AMPLE_PIECE)
        bring = partial(_brought_to, z.device)
        skip = _move(self._skip, z.device) if sparing and self._skip is not None else None
        x = self._middle(walk, z)
        *first, last = self.decoder.up_blocks
        for number, part in enumerate(first, 1):
            stage = bring(part)
            for block in stage.resnets:
                x = walk.residual(block, x)
            if number < len(first) or skip is None:
                x = walk.double(stage.upsamplers[0], x)
            if number < len(first):
                del stage, block  # before the next is brought
        blocks = list(bring(last).resnets)
        if skip is not None:
            x = walk.double_and_residual(stage.upsamplers[0], blocks.pop(0), skip, x)
        for block in blocks:
            x = walk.residual_again(block, x) if sparing and block.conv_shortcut is None else walk.residual(block, x)
        return walk.leave(bring(self.decoder.conv_norm_out), _move(self._colours, z.device), x)

    def decode_tiled(self, z: Tensor, tile: int) -> Tensor:
        """The same in tiles of `tile` latent cells, whole activations in RAM: see tiled_decoder.py."""
        bring = partial(_brought_to, z.device)
        middle = self._middle(self._walk(z.device, SPARING_PIECE), z).numbers.permute(2, 0, 1)[None]
        rest = self.decoder
        return enlarge_tiled(map(bring, rest.up_blocks), bring(rest.conv_norm_out), bring(rest.conv_out), middle, tile)

    def _middle(self, walk: _Walk, z: Tensor) -> Map:
        bring = partial(_brought_to, z.device)
        return walk.to_the_middle(bring(self.decoder.conv_in), bring(self.decoder.mid_block), z)

    def _walk(self, device: torch.device, piece: int) -> _Walk:
        return _Walk(maps.implementation(device), self.decoder.conv_norm_out.num_groups, piece)


@dataclass(frozen=True, slots=True)
class _Walk:
    """The steps of one decode. piece: bytes of a band of the widest tensor at hand."""

    ops: MapOperations
    groups: int
    piece: int

    def to_the_middle(self, conv_in: Module, mid_block: Module, z: Tensor) -> Map:
        """The first convolution and the mid block of z (1, 16, h, w)."""
        made = _convolve(conv_in.weight, F.pad(_rows_of(z), (0, 0, 0, 0, 1, 1)))
        x = Map(made, [self._settle(made, conv_in.bias, out=made)])
        del made
        x = self.residual(mid_block.resnets[0], x)
        for attention, block in zip(mid_block.attentions, mid_block.resnets[1:], strict=True):
            if attention is not None:
                x = self.attention(attention, x)
            x = self.residual(block, x)
        return x

    def residual(self, block: Module, x: Map) -> Map:
        """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), which lies where conv1's result did."""
        source = x.numbers
        height, width, channels = source.shape
        rows = self._rows(width, max(channels, block.conv1.out_channels))
        hidden = source.new_empty(height, width, block.conv1.out_channels)
        pieces = self._convolved(block.conv1, _slices(source, rows), height, self._factors(x, block.norm1))
        made = Map(hidden, self._store(pieces, block.conv1.bias, hidden))

        shortcut = block.conv_shortcut
        bias = block.conv2.bias if shortcut is None else block.conv2.bias + shortcut.bias
        pieces = self._convolved(block.conv2, _slices(hidden, rows), height, self._factors(made, block.norm2))
        skip = None if shortcut is None else shortcut.weight.flatten(1)
        return Map(hidden, self._store(pieces, bias, hidden, skip=lambda here: _linear(source[here], skip)))

    def residual_again(self, block: Module, x: Map) -> Map:
        """The same over x itself: conv1 is computed once for the sums of its result, and again for conv2."""
        numbers = x.numbers
        height, width, channels = numbers.shape
        rows = self._rows(width, channels)
        first = self._factors(x, block.norm1)
        conv1 = partial(self._convolved, block.conv1, height=height, factors=first)
        sums = list(map(partial(self._settle, bias=block.conv1.bias), conv1(_slices(numbers, rows))))
        second = self._factors(Map(numbers, sums), block.norm2, before=block.conv1.bias)
        pieces = self._convolved(block.conv2, conv1(_slices(numbers, rows)), height, second)
        return Map(numbers, self._store(pieces, block.conv2.bias, numbers, skip=lambda here: numbers[here]))

    def attention(self, layer: Module, x: Map) -> Map:
        """Self-attention of all pixels with one head, some queries at a time."""
        source = x.numbers
        height, width, channels = source.shape
        normed = torch.empty_like(source)
        self.ops.normalise(source, *self._factors(x, layer.group_norm), normed, silu=False)
        tokens = normed.view(-1, channels)
        k, v = (F.linear(tokens, part.weight, part.bias) for part in (layer.to_k, layer.to_v))
        for some in tokens.split(max(1, _SCORES // (4 * len(tokens)))):
            some.copy_(self._attend(F.linear(some, layer.to_q.weight, layer.to_q.bias), k, v))
        del k, v
        out = layer.to_out[0]
        made = F.linear(tokens, out.weight).view(height, width, channels)
        return Map(made, [self._settle(made, out.bias, skip=source, out=made)])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(queries, C). A head of 512 numbers is more than fast attention kernels take; matrix products take any."""
        if self.ops is eager:
            one: Tensor = F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])
            return one[0, 0]
        scores = _scores(q, k).mul_(q.shape[1] ** -0.5)
        return torch.softmax(scores, dim=-1).to(v.dtype) @ v

    def double(self, layer: Module, x: Map) -> Map:
        """Twice as many rows and columns, and a convolution of these."""
        height, width, _ = x.numbers.shape
        channels = layer.conv.out_channels
        out = x.numbers.new_empty(2 * height, 2 * width, channels)
        sums = []
        for top, places in self._places(layer.places.weight, x.numbers):
            here = out[2 * top : 2 * (top + len(places) - 1)]
            sums.append(self._settle(places, layer.conv.bias, out=here, doubled=True))
            del places
        return Map(out, sums)

    def double_and_residual(self, layer: Module, block: Module, skip: tuple[Tensor, Tensor], x: Map) -> Map:
        """residual(block, double(layer, x)), never storing the doubled map. skip: of the shortcut, doubling with it."""
        source, bias = x.numbers, layer.conv.bias
        height, width = 2 * source.shape[0], 2 * source.shape[1]
        channels, out_channels = layer.conv.out_channels, block.conv1.out_channels
        rows = self._rows(width, channels)

        def doubled() -> Iterator[Tensor]:
            for _, places in self._places(layer.places.weight, source):
                made = source.new_empty(2 * (len(places) - 1), width, channels)
                self._settle(places, bias, out=made, doubled=True)
                del places
                held = [made]
                del made  # whoever takes it is the only one to hold it
                yield held.pop()

        sums = []
        for _, places in self._places(layer.places.weight, source):
            sums.append(self._settle(places, bias, doubled=True))
            del places
        norm1 = self._factors(Map(source, sums), block.norm1, pixels=height * width)
        hidden = source.new_empty(height, width, out_channels)
        made = Map(
            hidden, self._store(self._convolved(block.conv1, doubled(), height, norm1), block.conv1.bias, hidden)
        )

        norm2 = self._factors(made, block.norm2)
        # The first piece is a row longer, so that results come in the pairs of rows that a doubling makes.
        pieces = self._convolved(block.conv2, _slices(hidden, rows, ahead=1), height, norm2)
        weight, skip_bias = skip
        sums, ways = [], self._places(weight, source, rows // 2)
        for piece in pieces:
            top, places = next(ways)
            here = hidden[2 * top : 2 * top + len(piece)]
            sums.append(self._settle(places, block.conv2.bias + skip_bias, skip=piece, out=here, doubled=True))
            del piece, places
        return Map(hidden, sums)

    def leave(self, norm: Module, colours: tuple[Tensor, Tensor], x: Map) -> Tensor:
        """The last norm and convolution, in float32: the picture (1, 3, H, W)."""
        numbers = x.numbers
        height, width, channels = numbers.shape
        picture = numbers.new_empty(3, height, width, dtype=torch.float32)
        weight, bias = colours
        frames = self._frames(
            _slices(numbers, self._rows(width, 2 * channels)), height, self._factors(x, norm), torch.float32
        )
        top = 0
        for piece in map(partial(_convolve, weight, bias=bias), frames):
            picture[:, top : top + len(piece)] = piece[..., :3].permute(2, 0, 1)
            top += len(piece)
            del piece
        return picture[None]

    # ---------------------------------------------------------------------------------------- pieces of the steps

    def _rows(self, width: int, channels: int) -> int:
        """Rows of a band of bfloat16 numbers: an even number, at least two."""
        return max(2, self.piece // (2 * width * channels) // 2 * 2)

    def _factors(
        self, x: Map, norm: nn.GroupNorm, *, before: Tensor | None = None, pixels: int | None = None
    ) -> Factors:
        count = x.numbers.shape[0] * x.numbers.shape[1] if pixels is None else pixels
        return self.ops.factors(x.sums, count, norm.weight, norm.bias, norm.eps, before)

    def _settle(
        self, x: Tensor, bias: Tensor | None, *, skip: Tensor | None = None, out: Tensor | None = None,
        doubled: bool = False,
    ) -> Tensor:  # fmt: skip
        return self.ops.settle(x, bias=bias, skip=skip, out=out, groups=self.groups, doubled=doubled)

    def _store(
        self, pieces: Iterable[Tensor], bias: Tensor, out: Tensor, skip: Callable[[slice], Tensor] | None = None
    ) -> list[Tensor]:
        """out's rows = the pieces, from above, + bias + skip(those rows); their sums. skip may look at out's rows."""
        sums, top = [], 0
        for piece in pieces:
            here = slice(top, top + len(piece))
            sums.append(self._settle(piece, bias, skip=None if skip is None else skip(here), out=out[here]))
            top = here.stop
            del piece  # before the next one is made
        return sums

    def _convolved(self, conv: Module, pieces: Iterable[Tensor], height: int, factors: Factors) -> Iterator[Tensor]:
        """conv(silu(normalised pieces)) without its bias, in pieces: the first a row shorter, the last one longer."""
        return map(partial(_convolve, conv.weight), self._frames(pieces, height, factors))

    def _frames(
        self, pieces: Iterable[Tensor], height: int, factors: Factors, dtype: torch.dtype | None = None
    ) -> Iterator[Tensor]:
        """The pieces of a map of that height, normalised, each behind the last two rows of the one before.

        The first stands behind a row of zeros, as the last before one: a 3x3 convolution that pads columns only makes
        all rows of its result of these, one after the other.
        """
        above: Tensor | None = None
        done = 0
        for piece in pieces:
            count, width, channels = piece.shape
            done += count
            dtype = dtype or piece.dtype
            begin = 1 if above is None else len(above)
            frame = piece.new_empty(begin + count + (done == height), width, channels, dtype=dtype)
            if above is None:
                frame[:1].zero_()
            else:
                frame[:begin] = above
            self.ops.normalise(piece, *factors, frame[begin : begin + count])
            del piece
            if done == height:
                frame[-1:].zero_()
            above = frame[-2:].clone()
            held = [frame]
            del frame  # whoever takes it is the only one to hold it
            if len(held[0]) > 2:
                yield held.pop()

    def _places(self, weight: Tensor, x: Tensor, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The four places of doubled pixels, (n + 1, W + 1, 4 C) for n rows of x at a time; with the first of these."""
        height, width, _ = x.shape
        rows = rows or self._rows(2 * width, len(weight) // 4) // 2
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            frame = x[max(top - 1, 0) : bottom + 1]
            if top == 0 or bottom == height:
                frame = F.pad(frame, (0, 0, 0, 0, int(top == 0), int(bottom == height)))
            yield top, _convolve(weight, frame)


def _slices(x: Tensor, rows: int, ahead: int = 0) -> Iterator[Tensor]:
    """x in bands of so many rows, the first one `ahead` longer."""
    top, height = 0, len(x)
    while top < height:
        bottom = min(top + rows + (ahead if top == 0 else 0), height)
        yield x[top:bottom]
        top = bottom


def _convolve(weight: Tensor, frame: Tensor, bias: Tensor | None = None) -> Tensor:
    """(H, W, I) to rows H - (kernel's rows - 1): columns are padded by one, rows have what they need around them."""
    result = F.conv2d(frame[None].permute(0, 3, 1, 2), weight, bias, padding=(0, 1))
    return _rows_of(result)


def _rows_of(image: Tensor) -> Tensor:
    """(1, C, H, W) as (H, W, C) without gaps: a view where it lies channels-last."""
    return image[0].permute(1, 2, 0).contiguous()


def _linear(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else F.linear(x, weight)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q @ k transposed in float32, which torch can only make of bfloat16 numbers on a GPU."""
    return torch.mm(q, k.t(), out_dtype=torch.float32)


def _skip_of_the_last_doubling(vae: Module, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Weight (4 O, I, 2, 2) and bias (O,) of doubling, convolution and the 1x1 convolution behind, in one."""
    *stages, last = vae.decoder.up_blocks
    if not stages:
        return None
    conv, shortcut = stages[-1].upsamplers[0].conv, last.resnets[0].conv_shortcut
    weight, bias = conv.weight.detach().float(), conv.bias.detach().float()
    if shortcut is not None:
        matrix = shortcut.weight.detach().float().flatten(1)
        weight = torch.einsum("oi,ijyx->ojyx", matrix, weight)
        bias = matrix @ bias + shortcut.bias.detach().float()
    places = four_places(weight).to(device, dtype)
    return places.to(memory_format=torch.channels_last), bias.to(device)


def _rebuilt(conv: Module, device: torch.device) -> nn.Conv2d:
    """A convolution of the same weights on `device`, without what an offloader has hung on the module."""
    made = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, device="meta")
    made.weight, made.bias = (
        nn.Parameter(part.detach().to(device), requires_grad=False) for part in (conv.weight, conv.bias)
    )
    return made


def _brought_to(device: torch.device, module: Module) -> Module:
    """A module whose weights are on `device`: itself, or a copy for as long as somebody holds it."""
    weights = list(module.parameters())
    here = weights[0].device
    if here.type == device.type and device.index in (None, here.index):
        return module
    # The memo of deepcopy: it takes these for the copies of the weights, and copies none itself.
    return copy.deepcopy(module, {id(p): nn.Parameter(p.to(device), requires_grad=False) for p in weights})


def _move(tensors: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = tensors
    return first.to(device), second.to(device)

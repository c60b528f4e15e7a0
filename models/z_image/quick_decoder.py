"""A VAE's decoder once more, in bfloat16 and channels last: what the tier `fast` decodes with.

Its last norm and convolution stay in float32: they write the colours, and rounded ones show as bands in a smooth sky.
On a CPU the copy runs as it is, in less than half the time (quick_decoder); on a GPU in bands of rows
(banded_decoder.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.z_image.cpu_attention import multiplies_bfloat16
from models.z_image.vae_numbers import computed_in
from shared.quant.unfilled import unfilled

# diffusers ships no types: its modules are known by the attributes used here.
Module = Any


def quick_decoder(vae: Module) -> Module | None:
    """A copy of a float32 VAE's decoder that takes a CPU less than half the time. None where it would not.

    The difference is 0.2 to 0.6 of 255 levels on average. For CPUs that multiply bfloat16.
    """
    weight = vae.decoder.conv_in.weight
    if weight.device.type != "cpu" or computed_in(vae) != torch.float32 or not multiplies_bfloat16():
        return None
    quick = rounded_decoder(vae, weight.device)
    quick.conv_norm_out.register_forward_pre_hook(lambda _norm, inputs: (inputs[0].float(),))
    for part in list(quick.modules()):
        for name, conv in part.named_children():
            if type(conv) is nn.Conv2d and conv.weight.dtype == torch.bfloat16:
                setattr(part, name, _LaidOut(conv))
    return quick


def rounded_decoder(vae: Module, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Module:
    """The VAE's decoder on `device`: in `dtype`, channels last, its end in float32, doubling and convolution in one.

    Built anew and filled with the weights from wherever they lie: an offloader's hooks stay behind.
    """
    from diffusers import AutoencoderKL

    with unfilled():  # as nothing is filled in, to be thrown away
        decoder: Module = AutoencoderKL.from_config(vae.config).decoder
    for name, weight in vae.decoder.named_parameters():
        owner, _, parameter = name.rpartition(".")
        kind = torch.float32 if owner in ("conv_norm_out", "conv_out") else dtype
        form = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
        kept = weight.detach().to(device, kind).to(memory_format=form)
        setattr(decoder.get_submodule(owner), parameter, nn.Parameter(kept, requires_grad=False))
    for block, exact in zip(decoder.up_blocks, vae.decoder.up_blocks, strict=True):
        if block.upsamplers is not None:
            weight = exact.upsamplers[0].conv.weight.detach().float()
            block.upsamplers[0] = Doubling(block.upsamplers[0].conv, weight)
    return decoder.eval()


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


class Doubling(nn.Module):
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
        phases = four_places(weight)
        places = nn.Conv2d(conv.in_channels, len(phases), 2, padding=1, bias=conv.bias is not None, device="meta")
        kept = phases.to(conv.weight.device, conv.weight.dtype).to(memory_format=torch.channels_last)
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


def four_places(weight: Tensor) -> Tensor:
    """The weights (O, I, 3, 3) of a convolution over doubled pixels as (4 O, I, 2, 2) over the pixels, place by place.

    The places of a doubled pixel in the order of its rows: (0, 0), (0, 1), (1, 0), (1, 1).
    """
    # "cpu" said aloud: an offloader may have made the GPU torch's default.
    sums = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=weight.dtype, device="cpu")
    sums = sums.to(weight.device)
    return torch.einsum("apy,bqx,oiyx->aboipq", sums, sums, weight).flatten(0, 2)

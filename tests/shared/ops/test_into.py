"""A linear that multiplies 8 bits gets 8 bits from the operation before it; every other gets numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.z_image.transformer import ZImageTransformer
from shared import ops
from shared.ops import Rounded, eager, round_rows
from shared.ops.rounding import Kind
from shared.quant.linear import PackedLinear
from shared.quant.packings import int8
from tests.support.tiny_model import TINY, randomise, relative_error

EPS = 1e-5


class Takes(nn.Module):
    """A linear, as far as it is asked here."""

    def __init__(self, kind: Kind | None) -> None:
        super().__init__()
        self.kind = kind

    def takes(self, _device: torch.device) -> Kind | None:
        return self.kind


def same(got: Tensor | Rounded, expected: Tensor, kind: Kind | None) -> bool:
    if kind is None:
        return isinstance(got, Tensor) and torch.equal(got, expected)
    wanted = round_rows(expected, kind)
    return isinstance(got, Rounded) and torch.equal(got.codes.float(), wanted.codes.float())


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_each_operation_hands_on_what_the_linear_takes(kind: Kind | None) -> None:
    x, y, weight, factor = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.rand(8), torch.rand(2, 1, 8)
    linear = Takes(kind)
    stream = eager.gate_residual(x, y, factor, weight, EPS)

    normed = ops.rms_norm_modulate_into(linear, x, weight, factor, EPS)
    got_stream, following = ops.gate_residual_norm_into(linear, x, y, factor, weight, weight, factor, EPS)
    opened = ops.swiglu_into(linear, x)

    assert same(normed, eager.rms_norm_modulate(x, weight, factor, EPS), kind)
    assert torch.equal(got_stream, stream)
    assert same(following, eager.rms_norm_modulate(stream, weight, factor, EPS), kind)
    assert same(opened, eager.swiglu(x), kind)


def test_a_plain_linear_takes_numbers() -> None:
    assert isinstance(ops.swiglu_into(nn.Linear(4, 4), torch.randn(1, 2, 8)), Tensor)


@torch.no_grad()
def test_a_block_hands_its_packed_linears_8_bits() -> None:
    """The whole network with a stand-in for a GPU's kernel that insists on codes."""
    network = randomise(ZImageTransformer(TINY), seed=1)
    assert isinstance(network, ZImageTransformer)
    latents, times, caption = torch.randn(1, 16, 4, 4), torch.tensor([0.3]), [torch.randn(3, TINY.cap_feat_dim)]
    plain = network(latents, times, caption)
    met: list[str] = []

    class Eight(PackedLinear):
        def takes(self, _device: torch.device) -> Kind | None:
            return "int8"

        def forward(self, x: Tensor | Rounded) -> Tensor:
            met.append(type(x).__name__)
            numbers = x.restore() if isinstance(x, Rounded) else x
            return numbers @ self.dequantize().t()

    block = network.layers[0]
    for owner, name in ((block.attention, "qkv"), (block.feed_forward, "w13"), (block.feed_forward, "w2")):
        weight = getattr(owner, name).weight.detach()
        setattr(owner, name, Eight(int8.pack(*int8.quantize(weight)), None, torch.float32))

    packed = network(latents, times, caption)

    assert met == ["Rounded"] * 3
    assert 1e-4 < relative_error(packed, plain) < 0.05

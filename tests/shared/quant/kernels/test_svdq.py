"""svdq-split gives what the dequantized weight gives, for no more operations."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shared.quant.kernels import Kernel, available, select
from shared.quant.linear import PackedLinear
from shared.quant.packing import Packed
from shared.quant.packings.svdq import Kind, Svdq
from shared.quant.svdquant import fit

ROWS, COLUMNS, RANK = 384, 128, 32
# The branch is added to the activations' product up to 96 tokens (rows * columns / (rows + columns)).
TOKENS = (1, 96, 97, 300)


def make_layer(kind: Kind, dtype: torch.dtype) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    smooth = torch.rand(COLUMNS, generator=generator) + 0.5
    group = {"int4": 64, "fp4": 16}[kind]
    tensors = fit(weight, kind=kind, rank=RANK, group=group, smooth=smooth, iterations=0, parts=1)
    bias = torch.randn(ROWS, generator=generator).to(dtype)
    return PackedLinear(Packed(Svdq(kind), (ROWS, COLUMNS), tensors), bias, dtype)


def split_and_dequantize() -> list[Kernel]:
    kernels = {kernel.name: kernel for kernel in available("svdq")}
    return [kernels["svdq-split"], kernels["dequantize"]]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_product_is_that_of_the_dequantized_weight(kind: Kind, tokens: int) -> None:
    layer = make_layer(kind, torch.float32)
    x = torch.randn(2, tokens, COLUMNS, generator=torch.Generator().manual_seed(1))[:, ::2]
    expected = x.double() @ layer.dequantize().double().t() + layer.bias.double()

    y = split_and_dequantize()[0].run(layer, x)

    assert y.shape == expected.shape
    assert (y - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", get_args(Kind))
def test_in_16_bits_it_errs_little_more_than_dequantizing(kind: Kind, tokens: int, dtype: torch.dtype) -> None:
    layer = make_layer(kind, dtype)
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ layer.packed.dequantize(torch.float32).double().t() + layer.bias.double()
    split, dequantize = split_and_dequantize()

    errors = [float((k.run(layer, x).double() - expected).norm() / expected.norm()) for k in (split, dequantize)]

    # Roundings of equal size: the smoothed activations, or the weight a second time, and the sum of the two products.
    assert errors[0] < 1.6 * errors[1], errors


def addmm_flops(_result: torch.Size, one: torch.Size, other: torch.Size, **_others: object) -> int:
    """Of addmm in place, which torch's counter does not know."""
    return 2 * one[0] * one[1] * other[1]


@pytest.mark.parametrize("tokens", TOKENS)
def test_it_takes_no_more_multiplications_than_dequantizing(tokens: int) -> None:
    layer = make_layer("int4", torch.float32)
    x = torch.ones(tokens, COLUMNS)
    split, dequantize = split_and_dequantize()

    def flops(kernel: Kernel) -> int:
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
            kernel.run(layer, x)
        return counter.get_total_flops()

    assert flops(dequantize) == 2 * ROWS * COLUMNS * (tokens + RANK)
    assert flops(split) <= flops(dequantize)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_an_apple_gpu_is_given_no_8_bit_float(kind: Kind) -> None:
    layer = make_layer(kind, torch.bfloat16)
    x = torch.randn(3, COLUMNS).bfloat16()
    expected, weight = split_and_dequantize()[0].run(layer, x), layer.dequantize()
    device = torch.device("mps")

    selection = select(layer, device)
    layer.use(selection.kernel, device)

    assert selection.kernel.name == {"fp4": "svdq-split-wide", "int4": "svdq-split"}[kind]
    refusals = {r.kernel: r.reason for r in selection.refusals}
    assert "the device is mps" in refusals["nunchaku"]
    assert refusals["comfy-svdq"]
    assert not any(buffer.dtype.is_floating_point and buffer.itemsize == 1 for buffer in layer.buffers())
    assert torch.equal(layer.dequantize(), weight)
    assert torch.equal(selection.kernel.run(layer, x), expected)


def test_elsewhere_fp4_keeps_its_8_bit_scales() -> None:
    layer = make_layer("fp4", torch.bfloat16)

    (wide,) = (kernel for kernel in available("svdq") if kernel.name == "svdq-split-wide")

    assert "the device is cpu" in str(wide.refuse(layer, torch.device("cpu")))

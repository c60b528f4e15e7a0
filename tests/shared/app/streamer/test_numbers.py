"""Streamed through a pretended GPU, a network computes the same numbers as on the CPU."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.app.offload import weight_bytes
from tests.support.fake_cuda import FakeCuda, on_gpu
from tests.support.streamed_network import (
    BLOCK,
    BLOCKS,
    MATRIX,
    TRUNK,
    WIDTH,
    build,
    inputs,
    place,
)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("lock", [0, 1 << 30])
@pytest.mark.parametrize("resident", [0, 3, BLOCKS])
def test_every_budget_computes_exactly_what_the_cpu_computes(
    gpu: FakeCuda, expected: Tensor, resident: int, lock: int, late: bool
) -> None:
    network = build()
    budget = TRUNK + (resident + (2 if resident < BLOCKS else 0)) * BLOCK
    offloader, lane = place({"transformer": network}, budget, lock=lock, staging=5000, late=late)

    for _ in range(2):
        result = network(inputs().to(offloader.device))

        assert on_gpu(result)
        assert torch.equal(result.cpu(), expected)
    assert lane.peak <= budget


def test_a_budget_for_less_than_one_block_is_raised_to_one_with_a_warning(
    gpu: FakeCuda, expected: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    network = build()
    with caplog.at_level(logging.WARNING):
        offloader, lane = place({"transformer": network}, 100)

    assert torch.equal(network(inputs().cuda()).cpu(), expected)
    assert lane.peak == offloader.budget == TRUNK + BLOCK
    assert "too few" in caplog.text


def test_whoever_reads_a_weight_between_forwards_finds_its_numbers(gpu: FakeCuda) -> None:
    network, untouched = build(), build()
    place({"transformer": network}, TRUNK + 2 * BLOCK, lock=1 << 30)
    network(inputs().cuda())

    for ours, theirs in zip(network.layers.parameters(), untouched.layers.parameters(), strict=True):
        assert isinstance(ours, nn.Parameter) and not on_gpu(ours)
        assert torch.equal(ours, theirs)


def test_channels_last_transposed_and_shared_tensors_keep_their_layout(gpu: FakeCuda) -> None:
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(linear.weight.detach().t())
    shared = nn.Linear(8, 8)
    shared.weight = linear.weight
    root = nn.ModuleList([nn.ModuleDict({"conv": conv, "linear": linear, "shared": shared})])
    holder = nn.Module()
    holder.blocks = root
    before = weight_bytes(holder)
    offloader, lane = place({"vae": holder}, 1 << 20, lock=1 << 20)
    x, y = torch.randn(1, 3, 5, 5), torch.randn(2, 8)
    expected = conv(x.cuda()), shared(y.cuda())

    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert lane.locked < before + 6 * 256  # the shared weight once
    offloader.release()
    assert torch.equal(expected[0].cpu(), conv(x))
    assert torch.equal(expected[1].cpu(), shared(y))


class Scaled(torch.Tensor):
    """int8 numbers and a scale that pass for one bfloat16 tensor, as quantisation libraries make them."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _context: None, _size: object, _stride: object) -> Scaled:
        return Scaled(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Scaled(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func} needs the numbers unpacked")


class ScaledLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        codes = torch.randint(-127, 128, (WIDTH, WIDTH), dtype=torch.int8)
        self.weight = nn.Parameter(Scaled(codes, torch.tensor(0.01, dtype=torch.bfloat16)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.codes.to(x.dtype) * self.weight.scale


def test_tensors_made_of_others_are_streamed_at_their_packed_size(gpu: FakeCuda) -> None:
    torch.manual_seed(0)
    network = nn.Module()
    network.blocks = nn.ModuleList(ScaledLayer() for _ in range(4))
    expected = [layer(inputs()) for layer in network.blocks]
    offloader, lane = place({"transformer": network}, 2 * (MATRIX // 2 + 256), lock=1 << 30)

    results = [layer(inputs().cuda()).cpu() for layer in network.blocks]
    offloader.release()

    assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))
    assert lane.copies == [MATRIX // 2 + 256] * 4
    assert torch.equal(network.blocks[0](inputs()), expected[0])

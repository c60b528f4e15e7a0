"""The pieces of a packed matrix whose rows lie apart come to lie one behind the other, whatever their sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shared.app.offload import DirectPlacement, Offloader, weight_bytes
from shared.app.stream_schedule import ALIGNMENT
from shared.app.streamer import StreamOffload
from shared.app.streamer.parts import Part
from shared.quant.linear import PackedLinear
from shared.quant.packing import join_rows
from shared.quant.packings import int8
from shared.quant.pieces import as_one, stack_rows
from shared.quant.stacked_linear import StackedLinear
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_lane import FakeLane

WIDTH, HEIGHTS = 12, (7, 5)  # neither codes nor scales of a piece end at a multiple of the alignment


class Block(nn.Module):
    def __init__(self, seed: int, *, stacked: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        parts = [int8.pack(*int8.quantize(torch.randn(height, WIDTH))) for height in HEIGHTS]
        packed = stack_rows(parts) if stacked else join_rows(parts)
        assert packed is not None
        kind = StackedLinear if stacked else PackedLinear
        self.linear = kind(packed, torch.randn(sum(HEIGHTS)).bfloat16(), torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


def network(*, stacked: bool) -> nn.Module:
    return nn.Sequential(nn.ModuleList(Block(seed, stacked=stacked) for seed in range(4)))


def run(blocks: nn.Module) -> list[bool]:
    """Whether every piece lay behind the one before it when its block ran."""
    found = []
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(9)).bfloat16().cuda()
    for block in blocks[0]:
        hook = block.linear.register_forward_hook(
            lambda layer, *_: found.extend(as_one(of) is not None for of in layer.packed.tensors.of.values())
        )
        x = block(x)
        hook.remove()
    assert torch.isfinite(x).all()
    return found


OFFLOADERS: dict[str, Callable[[], Offloader]] = {
    "direct": lambda: DirectPlacement("cuda", FakeLane),
    "streamed": lambda: StreamOffload(budget=4 * ALIGNMENT * 2, lane=FakeLane, staging=100),
    "streamed from locked RAM": lambda: StreamOffload(budget=4 * ALIGNMENT * 2, lock=1 << 20, lane=FakeLane),
}


@pytest.mark.parametrize("offloader", OFFLOADERS.values(), ids=OFFLOADERS)
def test_pieces_of_any_size_lie_one_behind_the_other(gpu: FakeCuda, offloader: Callable[[], Offloader]) -> None:
    blocks, placed = network(stacked=True), offloader()
    expected = [block.linear.dequantize() for block in blocks[0]]

    placed.place({"transformer": blocks})
    found = run(blocks) + run(blocks)
    placed.release()

    assert found == [True] * len(expected) * 2 * 2
    assert all(torch.equal(b.linear.dequantize(), weight) for b, weight in zip(blocks[0], expected, strict=True))


def test_a_layer_brought_alone_out_of_its_block_multiplies_as_ever(gpu: FakeCuda) -> None:
    blocks = network(stacked=True)
    x = torch.randn(3, WIDTH).bfloat16()
    with torch.no_grad():
        expected = blocks[0][2].linear(x)
    StreamOffload(budget=4 * ALIGNMENT * 2, lane=FakeLane).place({"transformer": blocks})

    with torch.no_grad():
        alone = blocks[0][2].linear(x.cuda())

    assert torch.equal(alone.cpu(), expected)


def test_stacked_rows_take_no_more_of_the_gpu_than_joined_ones() -> None:
    sizes = [Part("", list(network(stacked=stacked).modules())) for stacked in (True, False)]

    assert sizes[0].nbytes == sizes[1].nbytes
    assert weight_bytes(network(stacked=True)) == weight_bytes(network(stacked=False))

"""Failures leave everything usable, and after release nothing is left on the GPU."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from shared.app.streamer import StreamOffload
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_lane import FakeLane
from tests.support.streamed_network import (
    BLOCK,
    TRUNK,
    build,
    inputs,
    on_device,
    place,
)


@pytest.mark.parametrize("fail_at", [0, 1, 4, 8])
def test_running_out_of_memory_in_a_copy_leaves_everything_usable(
    gpu: FakeCuda, expected: Tensor, fail_at: int
) -> None:
    network = build()
    budget = TRUNK + 4 * BLOCK
    offloader, lane = place({"transformer": network}, budget, lock=1 << 30)
    lane.fail_at = fail_at

    def draw() -> None:
        for _ in range(3):
            network(inputs().cuda())

    with pytest.raises(torch.OutOfMemoryError):
        draw()
    assert offloader.held <= budget

    lane.fail_at = None
    assert torch.equal(network(inputs().cuda()).cpu(), expected)
    assert lane.peak <= budget


def test_an_error_inside_a_block_leaves_the_hosts_tensors_in_place(gpu: FakeCuda, expected: Tensor) -> None:
    network = build()
    place({"transformer": network}, TRUNK + 2 * BLOCK)
    bad = network.layers[4].down.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("broken")))
    with pytest.raises(ValueError, match="broken"):
        network(inputs().cuda())

    assert on_device(network.layers) == []
    bad.remove()
    assert torch.equal(network(inputs().cuda()).cpu(), expected)


@pytest.mark.parametrize("lock", [0, 1 << 30])
def test_after_release_nothing_is_left_on_the_gpu_and_the_cpu_draws_the_same(
    gpu: FakeCuda, expected: Tensor, lock: int
) -> None:
    network = build()
    before = {m: set(vars(m)) for m in network.modules()}
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules())
    offloader = StreamOffload(budget=TRUNK + 4 * BLOCK, lock=lock, lane=partial(FakeLane))
    offloader.place({"transformer": network})
    lane = offloader._lane
    assert isinstance(lane, FakeLane)
    network(inputs().cuda())

    offloader.release()
    gc.collect()

    assert lane.closed and lane.resident() == 0
    assert on_device(network) == []
    assert {m: set(vars(m)) for m in network.modules()} == before
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules()) == hooks
    assert torch.equal(network(inputs()), expected)


def test_it_can_be_placed_again_after_release_and_not_before(gpu: FakeCuda, expected: Tensor) -> None:
    network = build()
    offloader, _ = place({"transformer": network}, TRUNK + 4 * BLOCK)
    with pytest.raises(RuntimeError, match="release"):
        offloader.place({"transformer": network})
    offloader.release()
    offloader.release()

    offloader.place({"transformer": network})

    assert torch.equal(network(inputs().cuda()).cpu(), expected)


def test_it_says_what_stays_and_what_streams(gpu: FakeCuda) -> None:
    offloader, _ = place({"transformer": build(), "vae": nn.Linear(2, 2)}, TRUNK + 5 * BLOCK)

    assert "transformer 3 of 6 blocks, the others through 2 buffers" in offloader.describe()
    assert "vae whole" in offloader.describe()

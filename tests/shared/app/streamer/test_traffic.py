"""Exact traffic: what travels, when, through which buffers, and how long it is waited for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.app.offload import weight_bytes
from shared.app.stream_schedule import Block as TimedBlock
from shared.app.stream_schedule import choose_resident, simulate
from tests.support.fake_cuda import FakeCuda
from tests.support.streamed_network import (
    BLOCK,
    BLOCKS,
    KERNEL_SECONDS,
    TRUNK,
    Network,
    build,
    inputs,
    place,
)


@pytest.mark.parametrize("resident", [0, 3, BLOCKS - 2])
def test_each_streamed_block_travels_once_per_step_in_one_copy_and_resident_ones_never_again(
    gpu: FakeCuda, resident: int
) -> None:
    network = build()
    _, lane = place({"transformer": network}, TRUNK + (resident + 2) * BLOCK, lock=1 << 30)
    network(inputs().cuda())
    network(inputs().cuda())
    streamed = BLOCKS - resident
    moving = streamed if streamed > 2 else 0  # two stay in the ring's two buffers

    lane.copies.clear()
    for _ in range(3):
        network(inputs().cuda())

    assert lane.copies == [BLOCK] * (3 * moving)


def test_the_first_pass_copies_every_weight_once(gpu: FakeCuda) -> None:
    network = build()
    _, lane = place({"transformer": network}, TRUNK + 5 * BLOCK, lock=1 << 30)

    network(inputs().cuda())

    assert sorted(lane.copies) == sorted([TRUNK] + [BLOCK] * BLOCKS)


def test_unlocked_weights_go_through_two_small_buffers(gpu: FakeCuda) -> None:
    network = build()
    _, lane = place({"transformer": network}, TRUNK + 2 * BLOCK, staging=4096)

    network(inputs().cuda())

    assert lane.locked == 2 * 4096
    assert max(lane.copies) == 4096
    assert sum(lane.copies) == weight_bytes(network)


def test_ram_is_locked_up_to_its_limit_streamed_blocks_first(gpu: FakeCuda) -> None:
    network = build()
    _, lane = place({"transformer": network}, TRUNK + 4 * BLOCK, lock=3 * BLOCK)
    network(inputs().cuda())
    network(inputs().cuda())

    lane.copies.clear()
    network(inputs().cuda())

    assert lane.locked <= 3 * BLOCK + 2 * (1 << 20)  # and the two staging buffers
    assert lane.copies.count(BLOCK) == 3  # of four streamed blocks; the fourth goes tensor by tensor


def test_memory_that_cannot_be_locked_is_done_without(gpu: FakeCuda, expected: Tensor) -> None:
    network = build()
    _, lane = place({"transformer": network}, TRUNK + 2 * BLOCK, lock=1 << 30, lockable=False)

    assert torch.equal(network(inputs().cuda()).cpu(), expected)
    assert lane.locked == 0


def test_a_pass_in_another_order_is_learned(gpu: FakeCuda) -> None:
    class Backwards(Network):
        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    torch.manual_seed(0)
    network = Backwards().bfloat16().eval()
    _, lane = place({"transformer": network}, TRUNK + 2 * BLOCK, lock=1 << 30)
    network(inputs().cuda())
    network(inputs().cuda())

    lane.copies.clear()
    network(inputs().cuda())

    assert lane.copies == [BLOCK] * BLOCKS


@pytest.mark.parametrize("rate", [1e8, 1.6e9, 1e11])
@pytest.mark.parametrize("resident", [0, 3])
def test_the_time_spent_waiting_is_what_the_schedule_predicts(gpu: FakeCuda, rate: float, resident: int) -> None:
    network = build()
    _, lane = place({"transformer": network}, TRUNK + (resident + 2) * BLOCK, lock=1 << 30, rate=rate)
    stays = choose_resident([BLOCK] * BLOCKS, (resident + 2) * BLOCK)
    predicted = simulate([TimedBlock(BLOCK, KERNEL_SECONDS, s) for s in stays], rate, passes=6)[-1]
    for _ in range(5):
        network(inputs().cuda())

    lane.exposed = 0.0
    network(inputs().cuda())

    assert lane.exposed == pytest.approx(predicted.exposed_seconds, abs=KERNEL_SECONDS / 100)

"""Weights that all fit travel to the GPU through a few page-locked buffers, and arrive to the bit."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.app.offload import DirectPlacement, weight_bytes
from shared.app.streamer import bulk
from shared.app.streamer.bulk import upload_all
from tests.support.fake_cuda import FakeCuda, on_gpu
from tests.support.fake_lane import FakeLane
from tests.support.streamed_network import BLOCKS, MATRIX, build, inputs, on_device


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("threads", "piece"), [(1, 100), (3, 1000), (2, MATRIX), (4, 1 << 20)])
def test_everything_arrives_and_computes_what_the_cpu_computes(
    gpu: FakeCuda, expected: Tensor, threads: int, piece: int, late: bool
) -> None:
    """Late copies read their buffers at the last moment that is allowed: one that is filled too early shows."""
    network, lane = build(), FakeLane(late=late)
    names = [name for name, _ in (*network.named_parameters(), *network.named_buffers())]

    upload_all([network], lane, threads=threads, piece=piece)

    assert on_device(network) == names
    assert torch.equal(network(inputs().cuda()).cpu(), expected)
    assert sum(lane.copies) == weight_bytes(network)
    assert max(lane.copies) == min(piece, MATRIX)
    assert lane.locked <= 2 * threads * piece


def test_types_layouts_and_shared_tensors_are_kept(gpu: FakeCuda) -> None:
    network = nn.Module()
    network.convolution = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    network.turned = nn.Parameter(torch.randn(6, 4).t(), requires_grad=False)
    network.same = network.turned
    network.register_buffer("codes", torch.arange(7, dtype=torch.int8))
    network.register_buffer("empty", torch.empty(0, 3))
    network.register_buffer("apart", torch.arange(20.0)[::2])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    upload_all([network], FakeLane())

    for name, tensor in network.state_dict().items():
        assert on_gpu(tensor) and tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor.cpu(), before[name]), name
    assert network.convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert network.turned.stride() == (1, 4)
    assert network.turned.data_ptr() == network.same.data_ptr()


def test_pieces_are_read_by_several_threads_and_copied_in_order(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    both, readers = threading.Barrier(2, timeout=20), set()
    real = bulk._filled

    def filled(buffer: Tensor, source: Tensor) -> Tensor:
        if source.nbytes == MATRIX:
            both.wait()  # passes only when two are at work at once
            readers.add(threading.get_ident())
        return real(buffer, source)

    monkeypatch.setattr(bulk, "_filled", filled)
    network, lane = build(), FakeLane()

    upload_all([network.layers], lane, threads=2, piece=MATRIX)

    assert len(readers) == 2 and threading.get_ident() not in readers
    assert lane.copies == [MATRIX] * 2 * BLOCKS


@pytest.mark.parametrize("fail_at", [0, 5])
def test_memory_that_runs_out_leaves_everything_where_it_was(gpu: FakeCuda, expected: Tensor, fail_at: int) -> None:
    network, lane = build(), FakeLane()
    lane.fail_at = fail_at

    with pytest.raises(torch.OutOfMemoryError):
        upload_all([network], lane, threads=2, piece=1000)

    assert on_device(network) == []
    assert torch.equal(network(inputs()), expected)


def test_placement_uploads_closes_its_lane_and_takes_all_back(gpu: FakeCuda, expected: Tensor) -> None:
    network, lane = build(), FakeLane(lockable=False)
    offloader = DirectPlacement("cuda", lambda: lane)

    offloader.place({"transformer": network})
    drawn = network(inputs().cuda()).cpu()
    offloader.release()

    assert torch.equal(drawn, expected) and torch.equal(network(inputs()), expected)
    assert lane.closed and lane.copies and not on_device(network)


def test_a_lane_is_closed_when_placing_fails(gpu: FakeCuda) -> None:
    lane: Any = FakeLane()
    lane.fail_at = 0

    with pytest.raises(torch.OutOfMemoryError):
        DirectPlacement("cuda", lambda: lane).place({"transformer": build()})

    assert lane.closed

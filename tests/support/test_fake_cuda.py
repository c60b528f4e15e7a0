"""The pretended GPU refuses what a real one refuses, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.fake_cuda import fake_cuda


def test_tensors_of_two_devices_do_not_mix() -> None:
    with fake_cuda():
        weight, x = torch.ones(3, 3, device="cuda"), torch.ones(2, 3)

        with pytest.raises(RuntimeError, match=r"same device, but found \(2, 3\) on cpu, \(3, 3\) on cuda:0"):
            nn.functional.linear(x, weight)
        with pytest.raises(TypeError, match="numpy"):
            weight.numpy()


def test_results_parts_and_copies_know_their_device() -> None:
    with fake_cuda():
        x = torch.arange(6.0, device="cuda").reshape(2, 3)

        places = [t.device.type for t in (x + 1, x.sum(), x[0], *x.chunk(2), x.max(dim=0).values, torch.zeros_like(x))]
        back = x.cpu()

    assert places == ["cuda"] * len(places)
    assert type(back) is torch.Tensor
    assert back.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_modules_move_there_and_back_with_the_same_results() -> None:
    module, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), torch.randn(2, 3)
    module.requires_grad_(False)
    expected = module(x)
    with fake_cuda() as gpu:
        module.to("cuda")
        there = module(x.cuda())
        resident = gpu.resident()
        module.to("cpu")
        left = gpu.resident()

    assert torch.equal(there.as_subclass(torch.Tensor), expected)
    assert resident == sum(p.nbytes for p in module.parameters())
    assert left == 0
    assert torch.equal(module(x), expected)


def test_a_default_device_left_changed_shows() -> None:
    with fake_cuda() as gpu:
        torch.set_default_device("cuda")

        assert torch.ones(1).is_cuda
        assert gpu.default_device.type == "cuda"
    assert not torch.ones(1).is_cuda


def test_pinned_memory_is_known_by_its_parts() -> None:
    with fake_cuda() as gpu:
        pinned = torch.empty(8, pin_memory=True)

        assert pinned[2:].is_pinned()
        assert not torch.empty(8).is_pinned()
        assert gpu.pinned_bytes == 32


def test_afterwards_torch_knows_no_gpu_it_did_not_have() -> None:
    before = torch.cuda.is_available()
    with fake_cuda():
        assert torch.cuda.is_available()

    assert torch.cuda.is_available() is before

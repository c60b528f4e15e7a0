"""Networks are built without numbers, in the thread that asks for it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shared.quant.unfilled import unfilled


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.conv, self.table = nn.Conv2d(3, 8, 3), nn.Embedding(10, 4)
        self.register_buffer("angles", torch.arange(5.0))


class Calls(TorchDispatchMode):
    """Names of what torch is told to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_shapes_and_types_are_there_and_nothing_is_drawn() -> None:
    with Calls() as calls, unfilled():
        built = Network()
    with Calls() as usual, torch.device("meta"):
        expected = Network()

    filling = {"uniform_", "normal_", "fill_", "zero_"}
    assert usual.names & filling and not calls.names & filling
    tensors = dict(built.named_parameters()) | dict(built.named_buffers())
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in (*expected.named_parameters(), *expected.named_buffers())
    }


def test_other_threads_build_as_ever() -> None:
    found: list[nn.Linear] = []
    with unfilled():
        other = threading.Thread(target=lambda: found.append(nn.Linear(4, 6)))
        other.start()
        other.join()

    assert found[0].weight.device.type == "cpu" and found[0].weight.any()

"""A small network for the streamer, on a pretended lane that counts copies and time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared.app.streamer import StreamOffload
from tests.support.fake_cuda import on_gpu
from tests.support.fake_lane import FakeLane

WIDTH = 64
BLOCKS = 6
MATRIX = WIDTH * WIDTH * 2  # bytes in bfloat16: a multiple of the alignment, so that nothing is lost to it
BLOCK = 2 * MATRIX
TRUNK = 2 * 256  # a parameter and a buffer, each in its own 256 bytes
KERNEL_SECONDS = 1e-5


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Network(nn.Module):
    """A stack like a transformer's: a parameter of its own, a packed buffer, and a second way in."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("codes", torch.arange(WIDTH).to(torch.uint8))
        self.shift = nn.Identity()
        self.layers = nn.ModuleList(Layer() for _ in range(BLOCKS))

    def embed(self, x: Tensor) -> Tensor:
        return self.shift(x) + self.token + self.codes.to(self.token.dtype) / 256

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


def build(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network().bfloat16().eval().requires_grad_(False)


def inputs() -> Tensor:
    return torch.linspace(-1, 1, WIDTH, dtype=torch.bfloat16).repeat(4, 1)


def place(
    modules: dict[str, nn.Module], budget: int, *, lock: int = 0, staging: int = 1 << 20, **lane: Any
) -> tuple[StreamOffload, FakeLane]:
    """The streamer with its lane; every layer takes its time to compute."""
    pretended = FakeLane(**lane)
    offloader = StreamOffload(budget=budget, lock=lock, lane=lambda: pretended, staging=staging)
    offloader.place(modules)
    for module in modules.values():
        for layer in module.modules():
            if isinstance(layer, Layer):
                layer.register_forward_hook(
                    lambda layer, *_: pretended.compute(KERNEL_SECONDS, layer.up.weight, layer.down.weight),
                    prepend=True,
                )
    return offloader, pretended


def on_device(module: nn.Module) -> list[str]:
    return [name for name, t in (*module.named_parameters(), *module.named_buffers()) if on_gpu(t)]

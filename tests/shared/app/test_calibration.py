"""Calibration of a model that does not fit into memory: one block of it is there at a time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared.app.calibration import block_by_block
from shared.quant.mapping import map_bytes

SIDE, BLOCKS = 2048, 4  # 16 MiB of float32 a block


def mapped_kilobytes() -> int:
    """Memory of this process that is pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssShmem")))


class Blocks(nn.Module):
    """Products one after the other with weights that lie in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False, device="meta") for _ in range(BLOCKS))
        size = 4 * SIDE * SIDE
        for number, layer in enumerate(self.layers):
            weight = map_bytes(path, number * size, size).view(torch.float32).view(SIDE, SIDE)
            layer.weight = nn.Parameter(weight, requires_grad=False)
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            self.most = max(self.most, mapped_kilobytes())
        return x


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells of mapped memory in /proc")
def test_weights_in_a_file_are_in_memory_for_one_block_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    torch.full((BLOCKS * SIDE * SIDE,), 1 / SIDE).numpy().tofile(path)
    network, x = Blocks(path), torch.ones(1, SIDE)
    before = mapped_kilobytes()

    with block_by_block(network):
        result = network(x)
        in_blocks = network.most - before
    network.most = 0
    whole = network(x)
    all_at_once = network.most - before

    torch.testing.assert_close(result, torch.ones(1, SIDE))
    assert torch.equal(result, whole)
    assert in_blocks < 1.5 * 4 * SIDE * SIDE / 1024
    assert all_at_once > 3.5 * 4 * SIDE * SIDE / 1024

"""Parts called on their own, and several models under one budget."""

from __future__ import annotations

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
    Layer,
    build,
    inputs,
    on_device,
    place,
)


def test_a_part_of_a_block_that_is_called_alone_comes_alone(gpu: FakeCuda) -> None:
    network = build()
    x = inputs()
    expected = network.layers[3].up(x)
    _, lane = place({"transformer": network}, TRUNK + 2 * BLOCK, lock=1 << 30)

    result = network.layers[3].up(x.cuda())

    assert torch.equal(result.cpu(), expected)
    assert gpu.uploads[-1] == MATRIX
    assert lane.copies == []
    network(x.cuda())
    assert on_device(network.layers) == []


def test_a_second_way_into_a_model_brings_what_belongs_to_no_block(gpu: FakeCuda) -> None:
    network = build()
    expected = network.embed(inputs())
    network.register_module("shift", nn.RMSNorm(WIDTH).bfloat16())  # the first thing on that way that owns a weight
    network.shift.weight.data.fill_(1.0)
    expected = network.embed(inputs())
    place({"transformer": network}, TRUNK + 256 + 2 * BLOCK)

    assert torch.equal(network.embed(inputs().cuda()).cpu(), expected)


def test_a_large_table_of_a_streamed_model_stays_on_the_host(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.app.streamer.model.HOST_TABLE_BYTES", BLOCK)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(4096, WIDTH)
            self.layers = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed_tokens(ids)
            for layer in self.layers:
                x = layer(x)
            return x

    encoder = Encoder().bfloat16().eval()
    ids = torch.tensor([[1, 4000, 7]])
    expected = encoder(ids)
    _, lane = place({"text_encoder": encoder}, 4 * BLOCK)

    result = encoder(ids.cuda())

    assert on_gpu(result)
    assert torch.equal(result.cpu(), expected)
    assert lane.peak <= 4 * BLOCK < weight_bytes(encoder.embed_tokens)


def test_all_models_together_keep_the_budget_and_their_numbers(gpu: FakeCuda) -> None:
    models: dict[str, nn.Module] = {
        name: build(seed) for seed, name in enumerate(("text_encoder", "transformer", "vae"))
    }
    expected = {name: model(inputs()) for name, model in models.items()}
    budget = TRUNK + 5 * BLOCK
    offloader, lane = place(models, budget, lock=1 << 30)

    for _ in range(2):
        for name in ("text_encoder", "transformer", "transformer", "vae", "transformer"):
            assert torch.equal(models[name](inputs().cuda()).cpu(), expected[name])
            assert offloader.held <= budget
    assert lane.peak <= budget


def test_a_model_that_leaves_room_for_another_stays_beside_it(gpu: FakeCuda) -> None:
    models: dict[str, nn.Module] = {"transformer": build(0), "vae": build(1)}
    _, lane = place(models, 2 * (TRUNK + BLOCKS * BLOCK), lock=1 << 30)
    for model in models.values():
        model(inputs().cuda())

    lane.copies.clear()
    for model in models.values():
        model(inputs().cuda())

    assert lane.copies == []


def test_another_model_takes_only_the_room_it_needs(gpu: FakeCuda) -> None:
    models: dict[str, nn.Module] = {"transformer": build(0), "vae": build(1)}
    vae = models["vae"]
    vae.layers = vae.layers[:2]
    budget = 2 * TRUNK + 5 * BLOCK
    _, lane = place(models, budget, lock=1 << 30)
    models["transformer"](inputs().cuda())
    vae(inputs().cuda())

    lane.copies.clear()
    models["transformer"](inputs().cuda())

    # The ring made the room: its three blocks come again, and the first two for the next pass; the three others stayed.
    assert lane.copies == [BLOCK] * (3 + 2)
    assert lane.peak <= budget

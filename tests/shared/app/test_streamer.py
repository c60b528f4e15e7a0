"""The streamer on a pretended GPU: same numbers as the CPU, exact traffic, a kept budget, and gone after release."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.app.offload import weight_bytes
from shared.app.stream_schedule import Block as TimedBlock
from shared.app.stream_schedule import choose_resident, simulate
from shared.app.streamer import StreamOffload
from tests.support.fake_cuda import FakeCuda, fake_cuda, on_gpu
from tests.support.fake_lane import FakeLane
from tests.support.garbage import quick_collections

WIDTH = 64
BLOCKS = 6
MATRIX = WIDTH * WIDTH * 2  # bytes in bfloat16: a multiple of the alignment, so that nothing is lost to it
BLOCK = 2 * MATRIX
TRUNK = 2 * 256  # a parameter and a buffer, each in its own 256 bytes
KERNEL_SECONDS = 1e-5


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

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


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """release() collects garbage; without this each time looks through all of torch."""
    with quick_collections():
        yield


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda(total_memory=8 << 30) as device:
        yield device


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return build()(inputs())


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


# -- numbers ------------------------------------------------------------------------------------------------------


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


# -- traffic ------------------------------------------------------------------------------------------------------


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


# -- parts of a model on their own ----------------------------------------------------------------------------------


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


# -- several models -------------------------------------------------------------------------------------------------


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


# -- failures and ends ----------------------------------------------------------------------------------------------


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

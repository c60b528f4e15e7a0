"""The way through a block without modules gives what the modules give, and leaves to them what hangs on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.z_image import compiled_block, straight
from models.z_image.block import Block
from models.z_image.modulation import Factors, Moment, Timetable
from models.z_image.transformer import ZImageTransformer
from shared.ops import compiled_ready
from shared.quant.linear import PackedLinear
from shared.quant.packings import int8
from tests.support.only_torch import only_torch
from tests.support.tiny_model import TINY, randomise, relative_error

BFLOAT16 = torch.bfloat16


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def network(dtype: torch.dtype) -> ZImageTransformer:
    return randomise(ZImageTransformer(TINY).to(dtype), seed=1)  # type: ignore[return-value]


def answer(model: ZImageTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 16, 4, 8, generator=generator)
    captions = [torch.randn(n, TINY.cap_feat_dim, generator=generator) for n in (5, 40)]  # one is masked
    moment = Moment(Timetable(torch.tensor([0.1, 0.4])), 1)
    return model(latents, moment, [caption.to(model.dtype) for caption in captions])


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("packed", [False, True])
def test_it_gives_the_modules_bits(dtype: torch.dtype, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(dtype)
    if packed:
        feed_forward = model.layers[0].feed_forward
        codes, scale = int8.quantize(feed_forward.w13.weight)
        feed_forward.w13 = PackedLinear(int8.pack(codes, scale), None, dtype)

    with only_torch():
        found = answer(model)
    compiled = answer(model)
    monkeypatch.setattr(straight, "serves", lambda *args: False)

    with only_torch():
        expected = answer(model)
    assert torch.equal(found, expected)
    assert relative_error(compiled, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_blocks_from_kernel_to_kernel_give_its_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, met = network(dtype), []
    forward = compiled_block.forward
    monkeypatch.setattr(compiled_block, "forward", lambda *args: met.append(args) or forward(*args))
    found = answer(model)
    monkeypatch.setattr(compiled_block, "serves", lambda *args: False)

    assert torch.equal(found, answer(model))
    assert bool(met) == (compiled_ready.why_not() is None)


def test_a_bfloat16_networks_stream_is_no_further_from_float32_than_one_of_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network(BFLOAT16)
    wide = network(BFLOAT16).float()
    reference = answer(wide)
    error = relative_error(answer(model), reference)
    monkeypatch.setattr(Tensor, "is_cpu", False)  # the stream stays in bfloat16, blocks go the usual way

    assert error < relative_error(answer(model), reference)


def test_hooks_on_linears_are_called() -> None:
    model = network(torch.float32)
    before, met = answer(model), []
    hooked = model.layers[1].attention.out
    hooked.register_forward_hook(lambda module, inputs, output: met.append(module) or output.flip(-1))

    assert relative_error(answer(model), before) > 1e-3
    assert met == [hooked]


@pytest.mark.parametrize("part", ["attention", "feed_forward"])
def test_a_hooked_part_makes_the_block_go_the_usual_way(part: str) -> None:
    model = network(torch.float32)
    met: list[nn.Module] = []
    hooked = getattr(model.layers[0], part)
    hooked.register_forward_pre_hook(lambda module, inputs: met.append(module))

    answer(model)

    assert met == [hooked]


@pytest.mark.parametrize("what", ["exact", "gradients", "float16"])
def test_it_is_for_inference_in_the_fast_tier(what: str) -> None:
    block = Block(TINY)
    x = torch.zeros(1, 1, TINY.dim, dtype=torch.float16 if what == "float16" else torch.float32)
    f: Factors = block.factors(None, exact=what == "exact", apart=False)[0]

    with torch.set_grad_enabled(what == "gradients"):
        assert not straight.serves(block, x, f)


def test_a_forward_put_in_the_place_of_a_linears_own_is_called() -> None:
    linear = nn.Linear(2, 2)
    linear.forward = lambda x: x + 1  # type: ignore[method-assign]

    assert torch.equal(straight.product(linear, torch.zeros(1, 2)), torch.ones(1, 2))

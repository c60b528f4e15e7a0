"""What every packed linear promises, shown on the simplest packing there is: whole numbers times one row scale."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.ops import Sums, round_rows
from shared.quant import kernels
from shared.quant.linear import JoinedLinear, PackedLinear
from shared.quant.packing import Packed, join_rows
from shared.quant.packings import int8


@dataclass(frozen=True)
class Whole:
    """Codes (rows, columns) int8 and scales (rows, 1) float32."""

    name: str = "whole"

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return (tensors["codes"].float() * tensors["scale"]).to(dtype)

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        return {name: tensor[start:stop] for name, tensor in tensors.items()}

    def join_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def whole(rows: int = 6, columns: int = 8) -> Packed:
    codes = torch.randint(-100, 100, (rows, columns), dtype=torch.int8)
    return Packed(Whole(), (rows, columns), {"codes": codes, "scale": torch.rand(rows, 1) + 0.1})


@pytest.fixture
def layer() -> PackedLinear:
    return PackedLinear(whole(), torch.randn(6), torch.float32)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[kernels.Kernel]:
    """A kernel table of the test's own, with the real last resort in it."""
    registered = [k for k in kernels.available("whole") if k.name == "dequantize"]
    monkeypatch.setattr(kernels, "_registry", registered)
    return registered


def test_it_computes_what_its_dequantized_weight_does(layer: PackedLinear) -> None:
    x = torch.randn(2, 3, 8)

    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), layer.bias))


def test_it_is_taken_for_a_linear(layer: PackedLinear) -> None:
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, tuple(layer.weight.shape)) == (8, 6, (6, 8))
    assert layer._mm_requires_native_linear_forward


def test_code_that_computes_with_its_weight_fails_at_once(layer: PackedLinear) -> None:
    with pytest.raises(TypeError):
        F.linear(torch.randn(1, 8), layer.weight)


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.float16)]
)
def test_no_cast_touches_packed_numbers_or_scales(layer: PackedLinear, cast: Callable[[nn.Module], nn.Module]) -> None:
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}

    cast(layer)

    after = layer.state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )


def test_state_dict_goes_round(layer: PackedLinear) -> None:
    other = PackedLinear(whole(), torch.randn(6), torch.float32)

    other.load_state_dict(layer.state_dict())

    assert torch.equal(other.dequantize(), layer.dequantize())
    assert torch.equal(copy.deepcopy(layer).dequantize(), layer.dequantize())


def test_joined_parts_are_their_rows_on_top_of_each_other() -> None:
    parts = [whole(4), whole(2)]

    joined = join_rows(parts)

    assert joined is not None
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([p.dequantize(torch.float32) for p in parts]))
    assert torch.equal(joined.take_rows(4, 6).dequantize(torch.float32), parts[1].dequantize(torch.float32))


def test_parts_packed_differently_are_not_joined_but_stand_side_by_side() -> None:
    other = Packed(Whole("other"), (2, 8), whole(2).tensors)
    assert join_rows([whole(4), other]) is None

    plain = nn.Linear(8, 3, bias=False)
    layer = JoinedLinear([PackedLinear(whole(4), None, torch.float32), plain])
    x = torch.randn(5, 8)

    assert layer(x).shape == (5, 7)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize()))


def int8_layer(rows: int) -> PackedLinear:
    codes, scale = int8.quantize(torch.randn(rows, 64))
    return PackedLinear(int8.pack(codes, scale), None, torch.bfloat16, compute="int8")


@torch.no_grad()
def test_packed_parts_take_and_hand_on_integers_as_one_layer_of_all_their_rows() -> None:
    parts = [int8_layer(32), int8_layer(16)]
    joined = join_rows([part.packed for part in parts])
    assert joined is not None
    one, apart = PackedLinear(joined, None, torch.bfloat16, compute="int8"), JoinedLinear(parts)
    x = torch.randn(2, 5, 64).bfloat16()
    rounded, cpu = round_rows(x, "int8"), torch.device("cpu")

    assert apart.takes(cpu) == one.takes(cpu) == "int8"
    assert torch.equal(apart(x), one(x)) and torch.equal(apart(rounded), one(rounded))
    sums, expected = apart.unscaled(rounded), one.unscaled(rounded)
    assert isinstance(sums, Sums) and isinstance(expected, Sums)
    assert sums.shape == expected.shape
    assert all(map(torch.equal, sums[:3], expected[:3]))


def test_what_hangs_on_packed_parts_reads_the_activations_themselves() -> None:
    layer = JoinedLinear([int8_layer(32), int8_layer(16)])
    layer.register_forward_hook(lambda *_: None)

    assert layer.takes(torch.device("cpu")) is None
    assert JoinedLinear([int8_layer(32), nn.Linear(64, 16, bias=False)]).takes(torch.device("cpu")) is None


@pytest.mark.parametrize("bias", [False, True])
def test_plain_parts_give_what_one_linear_of_all_their_rows_gives(bias: bool) -> None:
    parts = [nn.Linear(8, 4, bias=bias), nn.Linear(8, 4, bias=bias), nn.Linear(8, 4, bias=bias)]
    x = torch.randn(2, 5, 8)
    expected = torch.cat([part(x) for part in parts], dim=-1)
    joined = JoinedLinear(parts)

    with torch.no_grad():
        got = joined(x)

    torch.testing.assert_close(got, expected)
    assert joined(x.requires_grad_()).requires_grad, "a gradient reaches the input"


def test_the_best_kernel_that_does_not_refuse_is_chosen_once(layer: PackedLinear, table: list[kernels.Kernel]) -> None:
    asked: list[str] = []

    def add(name: str, priority: int, reason: str | None) -> None:
        def refuse(_layer: PackedLinear, _device: torch.device) -> str | None:
            asked.append(name)
            return reason

        kernels.register(
            kernels.Kernel(name, "whole", "bf16", priority, refuse, lambda _l, x: x.new_full((1,), priority))
        )

    add("fast", 9, "needs wings")
    add("good", 5, None)

    assert float(layer(torch.randn(1, 8))) == 5
    layer(torch.randn(1, 8))
    assert asked == ["fast", "good"]
    assert "good" in repr(layer)


def doubled(packed: Packed) -> Packed:
    """The same weight kept another way."""
    tensors = {"codes": packed.tensors["codes"], "scale": packed.tensors["scale"] * 2}
    return Packed(Whole("halved"), packed.shape, tensors)


def halving(refusal: str | None = None) -> kernels.Kernel:
    """Reads weights only as doubled() keeps them."""
    return kernels.Kernel(
        "halving", "whole", "bf16", 9, lambda _layer, _device: refusal,
        lambda layer, x: F.linear(x, layer.dequantize() / 2, layer.bias),
        arrange=doubled, laid_out=lambda layer: layer.packing.name == "halved",
    )  # fmt: skip


def test_a_cpu_lays_a_weight_out_once_and_not_before_it_is_used(
    layer: PackedLinear, table: list[kernels.Kernel]
) -> None:
    x = torch.randn(3, 8)
    expected = F.linear(x, layer.dequantize(), layer.bias)
    before = layer.packed

    layer.use(halving(), torch.device("cpu"))

    assert layer.packing == before.packing and layer.packed.tensors["scale"] is before.tensors["scale"]
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)
    kept = layer.packed
    assert kept.packing.name == "halved" and not kept.tensors["scale"].is_inference()
    torch.testing.assert_close(layer(x), expected)
    assert layer.packed.tensors["scale"] is kept.tensors["scale"]


def test_for_a_gpu_a_weight_is_laid_out_at_once(layer: PackedLinear) -> None:
    layer.use(halving(), torch.device("cuda"))

    assert layer.packing.name == "halved"


def test_a_layer_that_chooses_for_itself_is_laid_out_too(layer: PackedLinear, table: list[kernels.Kernel]) -> None:
    x = torch.randn(3, 8)
    expected = F.linear(x, layer.dequantize(), layer.bias)
    kernels.register(halving())

    torch.testing.assert_close(layer(x), expected)
    assert layer.packing.name == "halved"

"""A linear of rows that lie in several places: what one of joined rows gives, and no copy where they lie in line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared.quant import kernels, mapping
from shared.quant.formats import mxfp8, nvfp4
from shared.quant.kernels.resolve import resolve
from shared.quant.linear import PackedLinear
from shared.quant.packing import Packed, join_rows
from shared.quant.packings import fp8, int8
from shared.quant.packings.block_scaled import BlockScaled
from shared.quant.packings.gguf import GgufBlocks
from shared.quant.packings.half import Half
from shared.quant.pieces import Pieces, as_one, outline, stack_rows
from shared.quant.stacked_linear import StackedLinear
from tests.support.packed_model import layer_of

CPU = torch.device("cpu")
COLUMNS = 64


def int8_rows(rows: int, seed: int = 0) -> Packed:
    torch.manual_seed(seed + rows)
    return int8.pack(*int8.quantize(torch.randn(rows, COLUMNS)))


def fp8_rows(rows: int, scale: float | None = 0.01) -> Packed:
    torch.manual_seed(rows)
    codes = fp8.cast(100 * torch.randn(rows, COLUMNS), "e4m3fn")
    return fp8.pack(codes, None if scale is None else torch.full((1, 1), scale))


def gguf_rows(rows: int) -> Packed:
    torch.manual_seed(rows)
    blocks = torch.randint(0, 50, (rows, COLUMNS // 32 * 34), dtype=torch.uint8)
    return Packed(GgufBlocks("Q8_0", COLUMNS), (rows, COLUMNS), {"blocks": blocks})


STACKS: dict[str, Callable[[], list[Packed]]] = {
    "int8": lambda: [int8_rows(3), int8_rows(5)],
    "fp8 without scales": lambda: [fp8_rows(3, None), fp8_rows(5, None)],
    "fp8 of one scale": lambda: [fp8_rows(3), fp8_rows(5), fp8_rows(2)],
    "fp8 of two scales": lambda: [fp8_rows(3), fp8_rows(5, 0.02)],
    "fp8 with and without a scale": lambda: [fp8_rows(3, None), fp8_rows(5)],
    "gguf": lambda: [gguf_rows(3), gguf_rows(5)],
}


def stacked(parts: list[Packed]) -> Packed:
    found = stack_rows(parts)
    assert found is not None
    return found


def in_line(layer: nn.Module) -> None:
    """Lay a layer's buffers one behind the other, as an offloader does."""
    memory, at = torch.empty(2**16, dtype=torch.uint8), 0
    for name, tensor in layer.named_buffers():
        view = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        layer._buffers[name] = view.copy_(tensor)
        at += tensor.nbytes


@pytest.mark.parametrize("parts", STACKS.values(), ids=STACKS)
def test_pieces_are_the_joined_rows_and_tell_so_without_joining(parts: Callable[[], list[Packed]]) -> None:
    joined, pieces = join_rows(parts()), stacked(parts())

    assert joined is not None and isinstance(pieces.tensors, Pieces)
    assert outline(pieces) == outline(joined)
    assert pieces.shape == joined.shape and pieces.nbytes == joined.nbytes
    assert all(torch.equal(pieces.tensors[name], tensor) for name, tensor in joined.tensors.items())
    assert torch.equal(pieces.dequantize(torch.float32), joined.dequantize(torch.float32))


@pytest.mark.parametrize(
    "parts",
    [
        [int8_rows(4), fp8_rows(4)],
        [int8_rows(4), replace(int8_rows(4), packing=int8.Int8(16))],
        [Packed(Half(), (2, 8), {"numbers": torch.zeros(2, 8).half()})] * 2,
    ],
    ids=["packings", "rotations", "a packing that is never laid so"],
)
def test_what_cannot_lie_as_one_matrix_is_not_stacked(parts: list[Packed]) -> None:
    assert stack_rows(parts) is None


def test_tensors_are_one_where_they_lie_one_behind_the_other_and_nowhere_else() -> None:
    memory = torch.arange(48.0)
    first, second = memory[:8].view(1, 8), memory[8:24].view(2, 8)
    first = first.as_strided((1, 8), (3, 1))  # a single row's stride means nothing

    one = as_one([first, second])

    assert one is not None and one.data_ptr() == memory.data_ptr()
    assert torch.equal(one, memory[:24].view(3, 8))
    assert as_one([second, first]) is None
    assert as_one([first, memory[16:32].view(2, 8)]) is None
    assert as_one([first, second.t()]) is None
    assert as_one([first, second.clone()]) is None
    assert as_one([second]) is second


@pytest.mark.parametrize("laid", [False, True])
@pytest.mark.parametrize("parts", STACKS.values(), ids=STACKS)
def test_it_multiplies_as_one_layer_of_the_joined_rows(parts: Callable[[], list[Packed]], laid: bool) -> None:
    joined = join_rows(parts())
    assert joined is not None
    bias = torch.randn(joined.shape[0]).bfloat16()
    one, apart = PackedLinear(joined, bias, torch.bfloat16), StackedLinear(stacked(parts()), bias, torch.bfloat16)
    x = torch.randn(2, 7, COLUMNS).bfloat16()
    if laid:
        in_line(apart)

    assert resolve([apart], CPU, trial=None) == resolve([one], CPU, trial=None)
    with torch.no_grad():
        assert torch.equal(apart(x), one(x))
    assert torch.equal(apart.dequantize(), one.dequantize())
    assert {name.partition("_")[0] for name, _ in apart.named_buffers()} == set(joined.tensors)


def test_laid_in_line_nothing_is_copied_for_a_product() -> None:
    layer = StackedLinear(stacked([int8_rows(3), int8_rows(5)]), None, torch.bfloat16)
    in_line(layer)

    tensors = layer.packed.tensors

    assert tensors["codes"].data_ptr() == layer.codes_0.data_ptr()
    assert tensors["scale"].data_ptr() == layer.scale_0.data_ptr()
    assert layer.continued == {"codes_1", "scale_1"}


def test_casts_moves_and_copies_leave_its_numbers_as_they_are() -> None:
    layer = StackedLinear(stacked([fp8_rows(3), fp8_rows(5, 0.02)]), None, torch.bfloat16)
    expected = layer.dequantize()
    other = StackedLinear(stacked([fp8_rows(3, 0.03), fp8_rows(5, 0.04)]), None, torch.bfloat16)

    other.load_state_dict(layer.state_dict())

    for same in (layer.to(torch.float16), copy.deepcopy(layer), other, layer.twin(CPU)):
        assert torch.equal(same.dequantize(), expected)


@dataclass(frozen=True)
class Turned(int8.Int8):
    """Another kernel's order: the codes of every row the other way round."""

    def dequantize(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return super().dequantize({**tensors, "codes": tensors["codes"].flip(1)}, dtype)


def test_what_a_kernel_wants_in_another_order_is_put_in_order_part_by_part() -> None:
    def arrange(packed: Packed) -> Packed:
        heights.append(packed.shape[0])
        return Packed(Turned(), packed.shape, {**packed.tensors, "codes": packed.tensors["codes"].flip(1)})

    heights: list[int] = []
    kernel = kernels.Kernel("turning", "int8", "bf16", 0, lambda *_: None, lambda *_: torch.empty(0), arrange=arrange)
    layer = StackedLinear(stacked([int8_rows(3), int8_rows(5)]), None, torch.bfloat16)
    expected, scales = layer.dequantize(), [layer.scale_0, layer.scale_1]

    layer.use(kernel, torch.device("cuda"))

    assert heights == [3, 5] and isinstance(layer.packing, Turned)
    assert torch.equal(layer.dequantize(), expected)
    assert layer.scale_0 is scales[0] and layer.scale_1 is scales[1], "what it reads as it lies is not copied"


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_swizzled_scales_stay_where_they_are_for_tensor_cores(tmp_path: Path, name: str) -> None:
    kind = {"nvfp4": nvfp4, "mxfp8": mxfp8}[name]
    kernel = next(kernel for kernel in kernels.available(name) if kernel.name == f"comfy-{name}")
    torch.manual_seed(0)
    weights = [torch.randn(128, COLUMNS), 3 * torch.randn(256, COLUMNS)]
    parts = [
        kind.read(layer_of(tmp_path / f"{i}.safetensors", kind.quantize(weight))) for i, weight in enumerate(weights)
    ]
    joined = join_rows(parts)
    assert joined is not None
    one, apart = PackedLinear(joined, None, torch.bfloat16), StackedLinear(stacked(parts), None, torch.bfloat16)

    for layer in (one, apart):
        layer.use(kernel, torch.device("cuda"))

    assert outline(apart.packed) == outline(one.packed)
    assert all(torch.equal(apart.packed.tensors[name], tensor) for name, tensor in one.packed.tensors.items())
    assert isinstance(apart.packing, BlockScaled)
    mapped = {name for name, tensor in apart.named_buffers() if mapping.is_mapped(tensor)}
    assert mapped == {f"{large}_{i}" for large in ("codes", apart.packing.scales) for i in (0, 1)}

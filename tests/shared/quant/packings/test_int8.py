"""Int8 weights against comfy-kitchen's eager code, and their rows."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from comfy_kitchen.tensor.int8_utils import _build_hadamard

from shared.quant.packing import Packed, join_rows
from shared.quant.packings import int8

CPU = torch.device("cpu")


def matrix(rows: int = 24, columns: int = 64, groups: int = 1, rotation: int = 0) -> Packed:
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    return int8.pack(codes, torch.rand(rows, groups) + 0.1, rotation)


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_rotation_is_comfy_kitchens_and_undoes_itself(size: int) -> None:
    assert torch.equal(int8.hadamard(size, CPU), _build_hadamard(size))

    weight = torch.randn(5, 2 * size)
    torch.testing.assert_close(int8.rotate(int8.rotate(weight, size), size), weight)


@pytest.mark.parametrize(
    ("size", "columns", "possible"),
    [(64, 384, True), (256, 384, False), (32, 384, False), (1, 4, False), (0, 4, False)],
)
def test_rotations_are_powers_of_four_that_divide_the_columns(size: int, columns: int, possible: bool) -> None:
    assert int8.is_rotation(size, columns) == possible


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotation", [0, 64])
def test_dequantizes_as_comfy_kitchen(dtype: torch.dtype, rotation: int) -> None:
    packed = matrix(rotation=rotation)
    codes, scale = packed.tensors["codes"], packed.tensors["scale"]

    expected = (
        kitchen.dequantize_int8_convrot_weight(codes, scale, rotation)
        if rotation
        else kitchen.dequantize_int8_simple(codes, scale)
    )

    assert torch.equal(packed.dequantize(dtype), expected.to(dtype))


def test_block_scales_serve_their_columns() -> None:
    packed = matrix(2, 6, groups=3)
    codes, scale = packed.tensors["codes"], packed.tensors["scale"]

    weight = packed.dequantize(torch.float32)

    assert all(weight[n, k] == codes[n, k] * scale[n, k // 2] for n in range(2) for k in range(6))


def test_scales_of_square_blocks_stay_as_few() -> None:
    codes, scale = matrix(6, 8, groups=1).tensors["codes"], torch.rand(3, 2)
    packed = int8.pack(codes, scale)

    joined = join_rows([packed, packed])

    weight = packed.dequantize(torch.float32)
    assert all(weight[n, k] == codes[n, k] * scale[n // 2, k // 4] for n in range(6) for k in range(8))
    assert joined is not None and joined.tensors["scale"].shape == (6, 2)
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([weight, weight]))
    assert torch.equal(packed.take_rows(1, 4).dequantize(torch.float32), weight[1:4])


@pytest.mark.parametrize(("groups", "rotation"), [(1, 0), (4, 0), (1, 16)])
def test_rows_are_taken_and_joined(groups: int, rotation: int) -> None:
    parts = [matrix(8, groups=groups, rotation=rotation), matrix(16, groups=groups, rotation=rotation)]
    joined = join_rows(parts)

    assert joined is not None
    whole = joined.dequantize(torch.float32)
    # ConvRot's products sum in an order that depends on the number of rows.
    close = {"rtol": 1e-5, "atol": 1e-4} if rotation else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(whole, torch.cat([p.dequantize(torch.float32) for p in parts]), **close)
    torch.testing.assert_close(joined.take_rows(3, 20).dequantize(torch.float32), whole[3:20], **close)


def test_rows_with_another_number_of_groups_or_rotation_are_not_joined() -> None:
    assert join_rows([matrix(), matrix(groups=2)]) is None
    assert join_rows([matrix(), matrix(rotation=16)]) is None


def test_one_scale_for_all_becomes_one_for_each_row() -> None:
    packed = int8.pack(torch.ones(3, 4, dtype=torch.int8), torch.tensor([[0.5]]))

    assert packed.tensors["scale"].tolist() == [[0.5]] * 3


def test_codes_are_kept_where_they_lie_so_that_mapped_ones_stay_mapped() -> None:
    storage = torch.randint(-128, 128, (16 * 64 + 3,), dtype=torch.int8)

    packed = int8.pack(storage[3:].view(64, 16), torch.ones(64, 1))

    assert packed.tensors["codes"].data_ptr() == storage.data_ptr() + 3
    assert packed.take_rows(1, 9).tensors["codes"].data_ptr() == storage.data_ptr() + 3 + 16


@pytest.mark.parametrize("per_row", [True, False])
def test_quantizes_as_comfy_kitchen(per_row: bool) -> None:
    weight = torch.randn(16, 64)

    codes, scale = int8.quantize(weight, per_row=per_row)

    theirs = kitchen.quantize_int8_rowwise(weight) if per_row else kitchen.quantize_int8_tensorwise(weight)
    assert torch.equal(codes, theirs[0])
    assert torch.equal(scale, theirs[1])

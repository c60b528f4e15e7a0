"""Scales are put in the tensor cores' order and back as cuBLAS documents it and comfy-kitchen does."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.float_utils import from_blocked, to_blocked

from shared.quant.swizzle import padded_shape, swizzle, unswizzle

SIZES = [(128, 4), (256, 8), (384, 24), (64, 24), (300, 6), (1, 1), (129, 5)]


def scales(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(1, 256, (rows, columns), dtype=torch.uint8, generator=generator)


def test_the_number_worked_in_the_module_is_where_it_says() -> None:
    matrix = torch.zeros(256, 8, dtype=torch.uint8)
    matrix[37, 6] = 1

    stored = swizzle(matrix)

    assert stored.flatten().nonzero().tolist() == [[598]]
    assert stored[74, 6] == 1


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_order_and_padding_are_comfy_kitchens(rows: int, columns: int) -> None:
    matrix = scales(rows, columns)

    stored = swizzle(matrix)

    assert stored.shape == padded_shape(rows, columns)
    assert torch.equal(stored, to_blocked(matrix, flatten=False))
    assert torch.equal(unswizzle(stored, rows, columns), from_blocked(stored, rows, columns))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_there_and_back_gives_the_same_bytes_of_every_type(rows: int, columns: int, dtype: torch.dtype) -> None:
    matrix = scales(rows, columns)

    back = unswizzle(swizzle(matrix.view(dtype)), rows, columns)

    assert back.dtype == dtype and back.is_contiguous()
    assert torch.equal(back.view(torch.uint8), matrix)


def test_a_band_of_128_rows_is_a_plain_slice() -> None:
    matrix = scales(384, 12)

    assert torch.equal(unswizzle(swizzle(matrix)[128:256], 128, 12), matrix[128:256])

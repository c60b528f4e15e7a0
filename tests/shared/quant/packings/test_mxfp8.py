"""MXFP8 is expanded to exactly the numbers that comfy-kitchen expands it to."""

from __future__ import annotations

import comfy_kitchen
import pytest
import torch

from shared.quant.packing import Packed, join_rows
from shared.quant.packings.mxfp8 import Mxfp8, powers
from shared.quant.swizzle import unswizzle

ROWS, COLUMNS = 160, 96


def packed(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Packed, torch.Tensor]:
    """A matrix that comfy-kitchen quantized, and what comfy-kitchen says it stands for, in float32."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02 * seed
    weight[0, :32] = 0.0
    values, stored = comfy_kitchen.quantize_mxfp8(weight, pad_32x=True)
    theirs = comfy_kitchen.dequantize_mxfp8(values, stored, torch.float32)
    exponents = unswizzle(stored.view(torch.uint8), rows, values.shape[1] // 32)
    padded = values.shape[1] > columns
    tensors = {"codes": values[:rows].view(torch.uint8), "exponents": exponents}
    return Packed(Mxfp8(columns if padded else None), (rows, columns), tensors), theirs[:rows, :columns]


@pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS), (128, 128), (130, 250), (1, 32)])
def test_numbers_are_comfy_kitchens(rows: int, columns: int) -> None:
    ours, theirs = packed(1, rows, columns)

    assert torch.equal(ours.dequantize(torch.float32), theirs)
    assert torch.equal(ours.dequantize(torch.bfloat16), theirs.to(torch.bfloat16))


def test_every_exponent_is_its_power_of_two_and_zero_is_zero() -> None:
    exponents = torch.arange(255, dtype=torch.uint8)

    assert powers(exponents).tolist() == [0.0, *(2.0 ** (e - 127) for e in range(1, 255))]


@pytest.mark.parametrize(("start", "stop"), [(0, 160), (0, 1), (37, 131), (128, 160)])
def test_rows_are_taken_anywhere(start: int, stop: int) -> None:
    ours, theirs = packed(1)

    rows = ours.take_rows(start, stop)

    assert rows.shape == (stop - start, COLUMNS)
    assert torch.equal(rows.dequantize(torch.float32), theirs[start:stop])
    assert rows.tensors["codes"].data_ptr() == ours.tensors["codes"][start:].data_ptr(), "rows were copied"


def test_parts_are_joined_exactly() -> None:
    (first, their_first), (second, their_second) = packed(1), packed(3, rows=48)

    joined = join_rows([first, second])

    assert joined is not None and joined.shape == (ROWS + 48, COLUMNS)
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([their_first, their_second]))


def test_differently_padded_parts_are_not_joined() -> None:
    assert join_rows([packed(1, columns=250)[0], packed(1, columns=256)[0]]) is None


def test_eight_and_a_quarter_bits_a_number() -> None:
    ours, _ = packed(1, rows=128, columns=1024)

    assert ours.nbytes * 8 / (128 * 1024) == 8.25

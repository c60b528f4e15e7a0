"""MXFP8 is expanded to exactly the numbers that comfy-kitchen expands it to."""

from __future__ import annotations

import pytest
import torch

from shared.quant.packings.mxfp8 import powers
from tests.support.block_scaled import COLUMNS, ROWS
from tests.support.block_scaled import mxfp8 as packed


@pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS), (128, 128), (130, 250), (1, 32)])
def test_numbers_are_comfy_kitchens(rows: int, columns: int) -> None:
    ours, theirs = packed(1, rows, columns)

    assert torch.equal(ours.dequantize(torch.float32), theirs)
    assert torch.equal(ours.dequantize(torch.bfloat16), theirs.to(torch.bfloat16))


def test_every_exponent_is_its_power_of_two_and_zero_is_zero() -> None:
    exponents = torch.arange(255, dtype=torch.uint8)

    assert powers(exponents).tolist() == [0.0, *(2.0 ** (e - 127) for e in range(1, 255))]


def test_eight_and_a_quarter_bits_a_number() -> None:
    ours, _ = packed(1, rows=128, columns=1024)

    assert ours.nbytes * 8 / (128 * 1024) == 8.25

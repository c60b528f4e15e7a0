"""NVFP4 is expanded to exactly the numbers that comfy-kitchen expands it to."""

from __future__ import annotations

import pytest
import torch

from tests.support.block_scaled import COLUMNS, ROWS
from tests.support.block_scaled import nvfp4 as packed


@pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS), (128, 64), (130, 250), (1, 16)])
def test_numbers_are_comfy_kitchens(rows: int, columns: int) -> None:
    ours, theirs = packed(1, rows, columns)

    assert torch.equal(ours.dequantize(torch.float32), theirs)


def test_narrow_types_are_rounded_once() -> None:
    ours, theirs = packed(1)

    assert torch.equal(ours.dequantize(torch.bfloat16), theirs.to(torch.bfloat16))


def test_four_and_a_half_bits_a_number() -> None:
    ours, _ = packed(1, rows=128, columns=1024)

    assert ours.nbytes * 8 / (128 * 1024) == pytest.approx(4.5 + 32 / 1024)

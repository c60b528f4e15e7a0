"""Rows of matrices with a scale for each block are taken and joined exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shared.quant.packing import Packed, join_rows
from tests.support.block_scaled import COLUMNS, ROWS, mxfp8, nvfp4

Pack = Callable[..., tuple[Packed, torch.Tensor]]


@pytest.fixture(params=[mxfp8, nvfp4], ids=lambda pack: pack.__name__)
def packed(request: pytest.FixtureRequest) -> Pack:
    pack: Pack = request.param
    return pack


@pytest.mark.parametrize(("start", "stop"), [(0, 160), (0, 1), (37, 131), (128, 160)])
def test_rows_are_taken_anywhere(packed: Pack, start: int, stop: int) -> None:
    ours, theirs = packed(1)

    rows = ours.take_rows(start, stop)

    assert rows.shape == (stop - start, COLUMNS)
    assert torch.equal(rows.dequantize(torch.float32), theirs[start:stop])
    assert rows.tensors["codes"].data_ptr() == ours.tensors["codes"][start:].data_ptr(), "rows were copied"


def test_parts_are_joined_exactly_whatever_their_scales(packed: Pack) -> None:
    (first, their_first), (second, their_second) = packed(1), packed(3, rows=48)

    joined = join_rows([first, second])

    assert joined is not None and joined.shape == (ROWS + 48, COLUMNS)
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([their_first, their_second]))


def test_differently_padded_parts_are_not_joined(packed: Pack) -> None:
    assert join_rows([packed(1, columns=250)[0], packed(1, columns=256)[0]]) is None

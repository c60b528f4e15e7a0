"""Rows of matrices with a scale for each block are taken and joined exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from shared.quant.packing import Packed, join_rows
from shared.quant.pieces import Pieces, stack_rows
from tests.support.block_scaled import COLUMNS, ROWS, mxfp8, nvfp4

Pack = Callable[..., tuple[Packed, torch.Tensor]]


@pytest.fixture(params=[mxfp8, nvfp4, partial(nvfp4, low_first=True)], ids=["mxfp8", "nvfp4", "nvfp4 low first"])
def pack(request: pytest.FixtureRequest) -> Pack:
    pack: Pack = request.param
    return pack


@pytest.fixture(params=[False, True], ids=["in rows", "swizzled"])
def packed(request: pytest.FixtureRequest, pack: Pack) -> Pack:
    return partial(pack, swizzled=request.param)


@pytest.mark.parametrize(("start", "stop"), [(0, 160), (0, 1), (37, 131), (128, 160), (0, 128), (37, 128)])
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


@pytest.mark.parametrize("columns", [96, 90])
def test_the_order_of_scales_makes_no_difference(pack: Pack, columns: int) -> None:
    (in_rows, theirs), (swizzled, _) = (pack(1, 300, columns, swizzled=order) for order in (False, True))

    assert set(swizzled.tensors) == set(in_rows.tensors)
    for packed in (in_rows, swizzled):
        assert torch.equal(packed.dequantize(torch.float32), theirs)


def test_swizzled_scales_are_cut_where_bands_end_and_joined_again_untouched(pack: Pack) -> None:
    whole, theirs = pack(1, 384, swizzled=True)
    scales = whole.packing.scales  # type: ignore[attr-defined]

    upper, lower = whole.take_rows(0, 128), whole.take_rows(128, 384)
    joined = join_rows([lower, upper])

    assert lower.tensors[scales].data_ptr() == whole.tensors[scales][128:].data_ptr(), "scales were copied"
    assert joined is not None
    assert torch.equal(joined.tensors[scales], whole.tensors[scales].roll(256, 0))
    assert torch.equal(joined.dequantize(torch.float32), theirs.roll(256, 0))


@pytest.mark.parametrize("rows", [128, 130])
def test_swizzled_parts_are_laid_one_behind_the_other_where_bands_end(pack: Pack, rows: int) -> None:
    (first, their_first), (second, their_second) = pack(1, rows, swizzled=True), pack(3, 48, swizzled=True)

    stacked = stack_rows([first, second])

    if rows == 130:
        assert stacked is None
        return
    assert stacked is not None
    assert torch.equal(stacked.dequantize(torch.float32), torch.cat([their_first, their_second]))
    assert isinstance(stacked.tensors, Pieces)
    for name, pieces in stacked.tensors.of.items():
        assert pieces[0] is first.tensors[name] and pieces[1] is second.tensors[name]


def test_differently_padded_parts_are_not_joined(packed: Pack) -> None:
    assert join_rows([packed(1, columns=250)[0], packed(1, columns=256)[0]]) is None

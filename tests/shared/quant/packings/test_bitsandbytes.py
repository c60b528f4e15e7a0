"""4-bit tables against bitsandbytes' own decoder, bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from shared.quant.packing import Packed, join_rows
from shared.quant.packings.bitsandbytes import TableBlocks
from shared.quant.pieces import stack_rows

ROWS, COLUMNS, BLOCK = 12, 256, 64


def nested(kind: str, seed: int = 0, rows: int = 200) -> tuple[Packed, torch.Tensor]:
    """The same with packed magnitudes: 4 in a row, 256 in a block of them, the last of which is short."""
    weight = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
    codes, state = quantize_4bit(weight, blocksize=BLOCK, quant_type=kind, compress_statistics=True)
    tensors = {
        "codes": codes.view(rows, -1),
        "absmax": state.absmax.view(rows, -1),
        "table": state.code,
        "nested_table": state.state2.code,
        "nested_absmax": state.state2.absmax,
        "nested_offset": state.offset.expand(len(state.state2.absmax)).contiguous(),
    }
    return Packed(TableBlocks(kind, 256), (rows, COLUMNS), tensors), dequantize_4bit(codes, state)


def packed(kind: str, seed: int = 0) -> tuple[Packed, torch.Tensor]:
    """A matrix that bitsandbytes packed, and what bitsandbytes unpacks it to."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    codes, state = quantize_4bit(weight, blocksize=BLOCK, quant_type=kind)
    tensors = {"codes": codes.view(ROWS, -1), "absmax": state.absmax.view(ROWS, -1), "table": state.code}
    return Packed(TableBlocks(kind), (ROWS, COLUMNS), tensors), dequantize_4bit(codes, state)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_bit_agrees_with_bitsandbytes(kind: str) -> None:
    for ours, theirs in (packed(kind), nested(kind)):
        assert torch.equal(ours.dequantize(torch.float32), theirs)


@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 128), (128, 200), (0, 200)])
def test_nested_magnitudes_are_cut_where_a_block_of_them_ends(start: int, stop: int) -> None:
    ours, theirs = nested("nf4")

    rows = ours.take_rows(start, stop)

    assert rows.tensors["absmax"].data_ptr() == ours.tensors["absmax"][start:].data_ptr(), "magnitudes were copied"
    assert torch.equal(rows.dequantize(torch.float32), theirs[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(1, 200), (64, 199), (3, 5)])
def test_elsewhere_they_are_unpacked_to_be_cut(start: int, stop: int) -> None:
    ours, theirs = nested("nf4")

    rows = ours.take_rows(start, stop)

    assert rows.tensors["absmax"].dtype == torch.float32
    assert torch.equal(rows.dequantize(torch.float32), theirs[start:stop])


@pytest.mark.parametrize("rows", [64, 65])
def test_nested_rows_are_joined_packed_where_blocks_of_magnitudes_end(rows: int) -> None:
    (one, whole), (other, rest) = nested("nf4", rows=rows), nested("nf4", 1)

    joined, stacked = join_rows([one, other]), stack_rows([one, other])

    assert joined is not None
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([whole, rest]))
    assert joined.tensors["absmax"].dtype == (torch.uint8 if rows == 64 else torch.float32)
    assert (stacked is None) == (rows == 65)
    assert stacked is None or torch.equal(stacked.dequantize(torch.float32), torch.cat([whole, rest]))


def test_nested_rows_of_other_tables_are_joined_unpacked() -> None:
    (one, whole), (other, _) = nested("nf4", rows=64), nested("nf4", 1)
    turned = Packed(
        other.packing, other.shape, {**other.tensors, "nested_table": other.tensors["nested_table"].flip(0)}
    )

    joined = join_rows([one, turned])

    assert joined is not None
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([whole, turned.dequantize(torch.float32)]))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rows_are_taken_and_joined_as_slices_of_the_matrix(kind: str) -> None:
    (one, whole), (other, rest) = packed(kind), packed(kind, seed=1)

    joined = join_rows([one, other])

    assert torch.equal(one.take_rows(3, 9).dequantize(torch.float32), whole[3:9])
    assert joined is not None
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([whole, rest]))


def test_matrices_with_other_tables_or_blocks_are_not_joined() -> None:
    one, _ = packed("nf4")
    table = Packed(one.packing, one.shape, {**one.tensors, "table": one.tensors["table"].flip(0)})
    finer = Packed(one.packing, one.shape, {**one.tensors, "absmax": one.tensors["absmax"].repeat_interleave(2, dim=1)})

    assert join_rows([one, table]) is None
    assert join_rows([one, finer]) is None
    assert join_rows([one, packed("fp4")[0]]) is None

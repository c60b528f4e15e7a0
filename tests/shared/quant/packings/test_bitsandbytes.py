"""4-bit tables against bitsandbytes' own decoder, bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from shared.quant.packing import Packed, join_rows
from shared.quant.packings.bitsandbytes import TableBlocks

ROWS, COLUMNS, BLOCK = 12, 256, 64


def packed(kind: str, seed: int = 0) -> tuple[Packed, torch.Tensor]:
    """A matrix that bitsandbytes packed, and what bitsandbytes unpacks it to."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    codes, state = quantize_4bit(weight, blocksize=BLOCK, quant_type=kind)
    tensors = {"codes": codes.view(ROWS, -1), "absmax": state.absmax.view(ROWS, -1), "table": state.code}
    return Packed(TableBlocks(kind), (ROWS, COLUMNS), tensors), dequantize_4bit(codes, state)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_bit_agrees_with_bitsandbytes(kind: str) -> None:
    ours, theirs = packed(kind)

    assert torch.equal(ours.dequantize(torch.float32), theirs)


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

"""Rows of plain numbers that lie in several places, of several types."""

from __future__ import annotations

import torch

from shared.quant.packing import Packed, join_rows
from shared.quant.packings.other_type import OtherType

TYPES = (torch.float32, torch.float16, torch.float64)


def test_rows_are_taken_and_joined_across_pieces() -> None:
    pieces = [torch.randn(rows, 8).to(dtype) for rows, dtype in zip((3, 1, 4), TYPES, strict=True)]
    whole = torch.cat([piece.to(torch.bfloat16) for piece in pieces])
    packing = OtherType(torch.bfloat16)
    joined = join_rows([Packed(packing, (len(piece), 8), packing.of([piece])) for piece in pieces])

    assert joined is not None
    assert torch.equal(joined.dequantize(torch.bfloat16), whole)
    for start in range(8):
        for stop in range(start + 1, 9):
            rows = joined.take_rows(start, stop)
            assert torch.equal(rows.dequantize(torch.bfloat16), whole[start:stop])
            assert all(t.untyped_storage().data_ptr() in {p.data_ptr() for p in pieces} for t in rows.tensors.values())

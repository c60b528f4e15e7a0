"""Rows of plain numbers that lie in several places, of several types."""

from __future__ import annotations

import pytest
import torch

from shared.quant.packing import Packed, join_rows
from shared.quant.packings import other_type
from shared.quant.packings.other_type import OtherType

TYPES = (torch.float32, torch.float16, torch.bfloat16)


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


def test_many_rows_are_cast_a_piece_at_a_time_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_type, "_AT_ONCE", 24)
    for stored in TYPES:
        pieces = [torch.randn(rows, 8).to(stored) for rows in (5, 3, 7)]
        for wanted in TYPES:
            found = OtherType(wanted).dequantize(OtherType.of(pieces), wanted)
            assert torch.equal(found, torch.cat(pieces).to(wanted))

"""NVFP4 is expanded to exactly the numbers that comfy-kitchen expands it to."""

from __future__ import annotations

import comfy_kitchen
import pytest
import torch

from shared.quant.packing import Packed, join_rows
from shared.quant.packings.nvfp4 import Nvfp4
from shared.quant.swizzle import unswizzle

ROWS, COLUMNS = 160, 96


def packed(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Packed, torch.Tensor]:
    """A matrix that comfy-kitchen quantized, and what comfy-kitchen says it stands for, in float32."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02 * seed
    scale = weight.abs().amax() / (448 * 6)
    codes, stored = comfy_kitchen.quantize_nvfp4(weight, scale, pad_16x=True)
    theirs = comfy_kitchen.dequantize_nvfp4(codes, scale, stored, torch.float32)
    tensors = {
        "codes": codes[:rows],
        "block_scales": unswizzle(stored.view(torch.uint8), rows, codes.shape[1] // 8),
        "tensor_scale": scale.expand(rows, 1).contiguous(),
    }
    padded = codes.shape[1] * 2 > columns
    return Packed(Nvfp4(columns if padded else None), (rows, columns), tensors), theirs[:rows, :columns]


@pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS), (128, 64), (130, 250), (1, 16)])
def test_numbers_are_comfy_kitchens(rows: int, columns: int) -> None:
    ours, theirs = packed(1, rows, columns)

    assert torch.equal(ours.dequantize(torch.float32), theirs)


def test_narrow_types_are_rounded_once() -> None:
    ours, theirs = packed(1)

    assert torch.equal(ours.dequantize(torch.bfloat16), theirs.to(torch.bfloat16))


@pytest.mark.parametrize(("start", "stop"), [(0, 160), (0, 1), (37, 131), (128, 160)])
def test_rows_are_taken_anywhere(start: int, stop: int) -> None:
    ours, theirs = packed(1)

    rows = ours.take_rows(start, stop)

    assert rows.shape == (stop - start, COLUMNS)
    assert torch.equal(rows.dequantize(torch.float32), theirs[start:stop])
    assert rows.tensors["codes"].data_ptr() == ours.tensors["codes"][start:].data_ptr(), "rows were copied"


def test_parts_of_different_tensor_scales_are_joined_exactly() -> None:
    (first, their_first), (second, their_second) = packed(1), packed(3, rows=48)

    joined = join_rows([first, second])

    assert joined is not None and joined.shape == (ROWS + 48, COLUMNS)
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([their_first, their_second]))


def test_differently_padded_parts_are_not_joined() -> None:
    assert join_rows([packed(1, columns=250)[0], packed(1, columns=256)[0]]) is None


def test_four_and_a_half_bits_a_number() -> None:
    ours, _ = packed(1, rows=128, columns=1024)

    assert ours.nbytes * 8 / (128 * 1024) == pytest.approx(4.5 + 32 / 1024)

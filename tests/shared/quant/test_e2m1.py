"""Sixteen numbers, the nearest of them, and two to a byte."""

from __future__ import annotations

import torch
from comfy_kitchen.float_utils import _f32_to_floatx_unpacked, fp4_x2_to_f32

from shared.quant import e2m1

EVERY_BYTE = torch.arange(256, dtype=torch.uint8).view(2, 128)


def test_every_byte_stands_for_the_numbers_comfy_kitchen_reads_in_it() -> None:
    ours = e2m1.unpack_values(EVERY_BYTE)

    assert torch.equal(ours, fp4_x2_to_f32(EVERY_BYTE))
    assert torch.equal(ours.signbit(), fp4_x2_to_f32(EVERY_BYTE).signbit()), "minus zero is a code of its own"


def test_every_code_survives_being_read_and_written() -> None:
    assert torch.equal(e2m1.pack(e2m1.encode(e2m1.unpack_values(EVERY_BYTE))), EVERY_BYTE)


def test_numbers_go_to_the_nearest_code_and_ties_to_the_even_one() -> None:
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    around = torch.cat([middles, middles.nextafter(torch.tensor(9.0)), middles.nextafter(torch.tensor(0.0))])
    numbers = torch.cat([around, -around, torch.linspace(-7, 7, 5001), torch.tensor([0.0, -0.0, 448.0])])

    codes = e2m1.encode(numbers)

    assert codes[:7].tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert torch.equal(codes, _f32_to_floatx_unpacked(numbers, 2, 1))


def test_with_the_low_half_first_neighbouring_columns_are_swapped() -> None:
    swapped = e2m1.unpack_values(EVERY_BYTE, low_first=True)

    assert torch.equal(swapped.view(-1, 2), e2m1.unpack_values(EVERY_BYTE).view(-1, 2).flip(1))

"""Scales are looked through by their bits, with the answer that torch gives number by number."""

from __future__ import annotations

import pytest
import torch

from shared.quant import svdq_tiling
from shared.quant.formats.scales import all_finite
from shared.quant.gguf_file import BLOCKS
from shared.quant.packings.gguf import scales_are_finite
from shared.quant.swizzle import swizzle, unswizzle

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "-nan"])
def test_one_number_that_is_none_is_found(dtype: torch.dtype, number: str) -> None:
    numbers = torch.linspace(-400, 400, 1001).to(dtype)
    assert all_finite(numbers)
    numbers[700] = -float("nan") if number == "-nan" else float(number)

    assert all_finite(numbers) == bool(numbers.float().isfinite().all())
    if dtype != torch.float8_e4m3fn:  # which has no infinity: a conversion may keep its largest number
        assert not all_finite(numbers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_and_the_smallest_numbers_are_numbers(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)

    assert all_finite(
        torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, 0.0, -0.0], dtype=dtype)
    )
    assert all_finite(torch.empty(0, dtype=dtype))
    assert all_finite(torch.tensor([[1.0, float("inf")], [2.0, 3.0]], dtype=dtype)[:, :1])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("skipped", [0, 1])
def test_gguf_scales_are_found_wherever_blocks_begin(kind: str, skipped: int) -> None:
    size = BLOCKS[kind][1]
    memory = torch.randint(0, 60, (5 * size + skipped,), dtype=torch.uint8)
    blocks = memory[skipped:].view(5, size)
    assert scales_are_finite(blocks, kind)
    at = size - 2 if kind == "Q6_K" else 0
    for high, is_finite in ((0x7B, True), (0x7C, False), (0xFC, False), (0x7F, False), (0x80, True)):
        blocks[3, at + 1] = high
        assert scales_are_finite(blocks, kind) == is_finite


@pytest.mark.parametrize("skipped", [0, 1, 4])
def test_tiles_of_scales_are_put_in_order_wherever_they_begin(skipped: int) -> None:
    natural = torch.randint(0, 126, (256, 12), dtype=torch.uint8)
    memory = torch.zeros(natural.numel() + skipped, dtype=torch.uint8)
    memory[skipped:] = swizzle(natural).flatten()
    assert torch.equal(unswizzle(memory[skipped:].view(256, 12), 256, 12), natural)

    memory[skipped:] = svdq_tiling.MICRO_SCALES.to_file(natural)
    stored = memory[skipped:].view(torch.float8_e4m3fn)
    assert torch.equal(svdq_tiling.unpack_scales(stored, 256, 12).view(torch.uint8), natural)

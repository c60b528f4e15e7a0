"""FP8 weights against comfy-kitchen's eager code, and their rows."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen

from shared.quant.packing import Packed, join_rows
from shared.quant.packings import fp8

KINDS = tuple(fp8.DTYPES)
SCALES = {
    "none": None,
    "tensor": torch.tensor([[0.3]]),
    "row": torch.rand(12, 1) + 0.1,
    "block": torch.rand(12, 4) + 0.1,
    "square": torch.rand(3, 4) + 0.1,
}


def matrix(scale: str, kind: str = "e4m3fn") -> Packed:
    return fp8.pack(fp8.cast(torch.randn(12, 32), kind), SCALES[scale])


def every_number(kind: str) -> torch.Tensor:
    """All 256 codes but NaN and infinity, padded with zeros."""
    codes = torch.arange(256).to(torch.uint8).view(fp8.DTYPES[kind])
    return torch.where(codes.float().isfinite(), codes.float(), 0.0).to(fp8.DTYPES[kind]).view(16, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_dequantizes_as_in_comfy_kitchen(kind: str) -> None:
    codes, scale = every_number(kind), torch.tensor([[0.3]])

    weight = fp8.pack(codes, scale).dequantize(torch.float32)

    assert torch.equal(weight, kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_devices_without_float8_look_the_same_numbers_up(kind: str, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).t()
    cast = codes.contiguous().view(fp8.DTYPES[kind]).to(dtype)

    found = fp8.decode(codes, kind, dtype)

    assert found.dtype == dtype
    assert torch.equal(found.isnan(), cast.isnan()) and torch.equal(found.nan_to_num(7), cast.nan_to_num(7))


@pytest.mark.parametrize(
    ("kind", "code", "value"),
    [("e4m3fn", 0x7E, 448), ("e4m3fn", 0x2A, 0.3125), ("e4m3fn", 0x81, -(2**-9)), ("e5m2", 0x7B, 57344)],
)
def test_the_numbers_of_the_page(kind: str, code: int, value: float) -> None:
    codes = torch.tensor([[code]], dtype=torch.uint8).view(fp8.DTYPES[kind])

    assert fp8.pack(codes, None).dequantize(torch.float32).item() == value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_is_rounded_once(dtype: torch.dtype) -> None:
    packed = matrix("row")

    values = packed.tensors["codes"].view(torch.float8_e4m3fn).double()
    expected = (values * packed.tensors["scale"].double()).float().to(dtype)

    assert torch.equal(packed.dequantize(dtype), expected)


def test_block_scales_serve_their_columns() -> None:
    packed = matrix("block")
    codes, scale = packed.tensors["codes"].view(torch.float8_e4m3fn).float(), packed.tensors["scale"]

    weight = packed.dequantize(torch.float32)

    assert all(weight[n, k] == codes[n, k] * scale[n, k // 8] for n in range(12) for k in range(32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("none", "none"),
        ("tensor", "tensor"),
        ("row", "row"),
        ("block", "block"),
        ("none", "tensor"),
        ("tensor", "row"),
        ("square", "square"),
        ("square", "block"),
    ],
)
def test_rows_are_taken_and_joined(kind: str, one: str, other: str) -> None:
    parts = [matrix(one, kind), matrix(other, kind)]
    joined = join_rows(parts)

    assert joined is not None
    whole = joined.dequantize(torch.float32)
    assert torch.equal(whole, torch.cat([p.dequantize(torch.float32) for p in parts]))
    assert torch.equal(joined.take_rows(5, 20).dequantize(torch.float32), whole[5:20])


def test_scales_of_square_blocks_stay_as_few() -> None:
    packed = matrix("square")

    joined = join_rows([packed, packed])

    weight = packed.dequantize(torch.float32)
    codes, scale = packed.tensors["codes"].view(torch.float8_e4m3fn).float(), packed.tensors["scale"]
    assert all(weight[n, k] == codes[n, k] * scale[n // 4, k // 8] for n in range(12) for k in range(32))
    assert joined is not None and joined.tensors["scale"].shape == (6, 4)
    assert packed.take_rows(4, 12).tensors["scale"].data_ptr() == scale[1:].data_ptr(), "scales were copied"
    assert packed.take_rows(3, 12).tensors["scale"].shape == (9, 4)


def test_equal_scales_of_whole_matrices_stay_one_number_when_joined() -> None:
    codes = fp8.cast(torch.randn(4, 8), "e4m3fn")
    parts = [fp8.pack(codes, torch.tensor([[s]])) for s in (0.5, 0.5, 0.25)]

    same, different = join_rows(parts[:2]), join_rows(parts)

    assert same is not None
    assert same.tensors["scale"].tolist() == [[0.5]]
    assert different is not None
    assert different.tensors["scale"].tolist() == [[0.5]] * 8 + [[0.25]] * 4


def test_kinds_and_groups_are_not_mixed() -> None:
    assert join_rows([matrix("none"), matrix("none", "e5m2")]) is None
    assert join_rows([matrix("row"), matrix("block")]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_casts_round_to_nearest_and_stop_at_the_largest_number(kind: str) -> None:
    largest = torch.finfo(fp8.DTYPES[kind]).max

    codes = fp8.cast(torch.tensor([1e9, -1e9, 1.06, 0.0]), kind)

    assert codes.float().tolist() == [largest, -largest, 1.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_quantizes_as_comfy_kitchen(kind: str) -> None:
    weight = torch.randn(16, 64)

    scale = fp8.scale_for(weight, kind)

    theirs = kitchen.quantize_per_tensor_fp8(weight, scale, fp8.DTYPES[kind]).float()
    ours = fp8.cast(weight / scale, kind).float()
    # They multiply by 1 / scale, which moves a number across a rounding border now and then.
    assert (ours != theirs).float().mean() < 0.01
    torch.testing.assert_close(ours, theirs, rtol=0.26, atol=0.02)

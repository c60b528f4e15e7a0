"""Rows unpacked by compiled code are those of the packing's own arithmetic, and products come from them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.quant import kernels
from shared.quant.gguf_file import BLOCKS
from shared.quant.kernels import compiled_expand, compiled_rows, torch_int8
from shared.quant.kernels.compiled_expand import _ROWS, expand
from shared.quant.linear import PackedLinear
from shared.quant.packing import Packed
from shared.quant.packings import fp8
from shared.quant.packings.bitsandbytes import TableBlocks
from shared.quant.packings.gguf import _SCALES, GgufBlocks
from shared.quant.packings.mxfp8 import Mxfp8
from shared.quant.packings.nvfp4 import Nvfp4
from shared.quant.packings.svdq import Svdq
from tests.shared.quant.kernels.conftest import swizzled
from tests.support import block_scaled

ROWS, COLUMNS, RANK = 24, 512, 8
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def some_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def finite_fp8(*shape: int, kind: str = "e4m3fn") -> Tensor:
    """Every code but those that stand for no number."""
    codes = torch.tensor([c for c in range(256) if np.isfinite(float(_decoded(c, kind)))], dtype=torch.uint8)
    return codes[torch.randint(0, len(codes), shape)]


def _decoded(code: int, kind: str) -> Tensor:
    return torch.tensor([code], dtype=torch.uint8).view(fp8.DTYPES[kind]).float()


def nvfp4() -> Packed:
    scales = (torch.rand(ROWS, COLUMNS // 16) * 400 + 0.001).to(torch.float8_e4m3fn).view(torch.uint8)
    tensors = {"codes": some_bytes(ROWS, COLUMNS // 2), "block_scales": scales, "tensor_scale": torch.rand(ROWS, 1)}
    return Packed(Nvfp4(), (ROWS, COLUMNS), tensors)


def svdq(kind: str, scales: torch.dtype) -> Packed:
    group = {"int4": 64, "fp4": 16}[kind]
    tensors = {
        "codes": some_bytes(ROWS, COLUMNS // 2),
        "scales": (torch.rand(ROWS, COLUMNS // group) + 0.01).to(scales),
        "row_scale": torch.ones(ROWS, 1) if kind == "int4" else torch.rand(ROWS, 1),
        "smooth": (torch.rand(COLUMNS) + 0.5).bfloat16(),
        "down": torch.randn(RANK, COLUMNS).bfloat16() / 8,
        "up": torch.randn(ROWS, RANK).bfloat16(),
    }
    return Packed(Svdq(kind), (ROWS, COLUMNS), tensors)  # type: ignore[arg-type]


def float8(kind: str, scale: Tensor | None) -> Packed:
    tensors = {"codes": finite_fp8(ROWS, COLUMNS, kind=kind)} | ({} if scale is None else {"scale": scale})
    return Packed(fp8.Float8(kind), (ROWS, COLUMNS), tensors)


def mxfp8() -> Packed:
    exponents = torch.randint(110, 130, (ROWS, COLUMNS // 32), dtype=torch.uint8)
    return Packed(Mxfp8(), (ROWS, COLUMNS), {"codes": finite_fp8(ROWS, COLUMNS), "exponents": exponents})


def table_blocks(kind: str, *, nested: bool = False) -> Packed:
    tensors = {"codes": some_bytes(ROWS, COLUMNS // 2), "table": torch.linspace(-1, 1, 16)}
    magnitudes = ROWS * COLUMNS // 64
    if not nested:
        return Packed(TableBlocks(kind), (ROWS, COLUMNS), tensors | {"absmax": torch.rand(ROWS, COLUMNS // 64)})
    tensors |= {"absmax": some_bytes(ROWS, COLUMNS // 64), "nested_table": torch.rand(256)}
    of_blocks = {name: torch.rand(-(-magnitudes // 128)) for name in ("nested_absmax", "nested_offset")}
    return Packed(TableBlocks(kind, 128), (ROWS, COLUMNS), tensors | of_blocks)


def blocks(kind: str) -> Packed:
    """Any bytes, but for the scales, which are numbers."""
    numbers, size = BLOCKS[kind]
    data = some_bytes(ROWS * COLUMNS // numbers, size)
    for place in _SCALES[kind]:
        scales = torch.cat([torch.rand(len(data) - 8, 1) / 64, torch.rand(8, 1) * 2**-16]).half()  # some subnormal
        data[:, place : place + 2] = scales.view(torch.uint8).view(-1, 2)
    return Packed(GgufBlocks(kind, COLUMNS), (ROWS, COLUMNS), {"blocks": data.view(ROWS, -1)})


PACKED = {
    "nvfp4": nvfp4,
    "svdq int4": lambda: svdq("int4", torch.bfloat16),
    "svdq int4, float16": lambda: svdq("int4", torch.float16),
    "svdq fp4": lambda: svdq("fp4", torch.float8_e4m3fn),
    "fp8": lambda: float8("e4m3fn", torch.rand(1, 1)),
    "fp8 by rows": lambda: float8("e4m3fn", torch.rand(ROWS, 1)),
    "fp8 in groups": lambda: float8("e4m3fn", torch.rand(ROWS, 4)),
    "fp8 in square blocks": lambda: float8("e4m3fn", torch.rand(ROWS // 4, 4)),
    "fp8 bare": lambda: float8("e4m3fn", None),
    "e5m2": lambda: float8("e5m2", torch.rand(1, 1)),
    "mxfp8": mxfp8,
    "nvfp4 as files have it": lambda: swizzled(nvfp4()),
    "mxfp8 as files have it": lambda: swizzled(mxfp8()),
    "nf4": lambda: table_blocks("nf4"),
    "fp4": lambda: table_blocks("fp4"),
    **{kind: (lambda kind=kind: blocks(kind)) for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")},
    **{kind: (lambda kind=kind: blocks(kind)) for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")},
}


def four_bit_part(packed: Packed) -> Tensor:
    if isinstance(packed.packing, Svdq):
        return packed.packing.residual(packed.tensors, torch.float32)
    return packed.dequantize(torch.float32)


@pytest.mark.parametrize("name", PACKED)
def test_rows_are_the_packings_own(name: str) -> None:
    packed = PACKED[name]()
    expected = four_bit_part(packed)
    whole, narrow, codes = (torch.empty(ROWS, COLUMNS, dtype=d) for d in (torch.float32, torch.bfloat16, torch.int8))

    assert expand(packed, whole) is None and expand(packed, narrow) is None
    scale = expand(packed, codes)

    torch.testing.assert_close(whole, expected, rtol=2e-6, atol=float(expected.abs().max()) * 1e-6)
    assert torch.equal(narrow, whole.bfloat16())
    assert scale is not None
    least = whole.abs().amax(1, keepdim=True) / 127
    # Of nibbles the largest value counts that a code can have: -8, which scales are not made for, or an E2M1 code's 6.
    room = 8 / 7 if packed.packing.name in ("nvfp4", "svdq") else 1.0
    assert bool((scale >= least * 0.99999).all()) and bool((scale <= least * room * 1.00001).all())
    assert (codes - whole / scale).abs().max() < 0.5001  # a half may go either way


# 300 rows are two bands and a part of one; 13 or 7 blocks in a row end within a tile of four.
@pytest.mark.parametrize("columns", [512, 224])
@pytest.mark.parametrize("pack", [block_scaled.nvfp4, partial(block_scaled.nvfp4, low_first=True), block_scaled.mxfp8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_swizzled_scales_are_read_where_they_lie(pack: Any, columns: int, dtype: torch.dtype) -> None:
    in_rows, lying = (pack(1, 300, columns, swizzled=order)[0] for order in (False, True))
    expected, got = torch.empty(300, columns, dtype=dtype), torch.empty(300, columns, dtype=dtype)

    scales = expand(in_rows, expected), expand(lying, got)

    assert torch.equal(got, expected)
    assert scales[0] is scales[1] is None or torch.equal(*scales)
    if dtype == torch.float32:
        torch.testing.assert_close(got, lying.dequantize(torch.float32), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_rows_are_its_own_to_the_bit(nested: bool) -> None:
    packed = table_blocks("nf4", nested=nested)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(ROWS, COLUMNS, dtype=dtype)

        expand(packed, out)

        assert torch.equal(out, packed.dequantize(dtype))


def test_bitsandbytes_weights_are_multiplied_in_16_bits_unless_int8_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_int8, "_LARGE", ROWS)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    layers = [PackedLinear(table_blocks("nf4", nested=True), None, torch.bfloat16, compute=c) for c in ("auto", "int8")]

    assert [layer.kernel(CPU).name for layer in layers] == ["compiled-bf16", "compiled-int8"]
    x = torch.randn(3, COLUMNS).bfloat16()
    assert torch.equal(layers[0](x), F.linear(x, layers[0].dequantize()))


def test_threads_begin_within_a_band() -> None:
    packed, _ = block_scaled.nvfp4(1, 300, 512, swizzled=True)
    expected, got = torch.empty(300, 512), torch.empty(300, 512)
    expand(packed, expected)

    found = compiled_expand._ROWS["nvfp4"](packed)
    assert not isinstance(found, str)
    for first, last in ((0, 77), (77, 150), (150, 300)):
        compiled_rows.nibbles(first, last, 512, *found.arguments, got.data_ptr(), 0, 0)

    assert torch.equal(got, expected)


def test_every_packing_in_the_table_is_tested() -> None:
    assert {PACKED[name]().packing.name for name in PACKED} == set(_ROWS)


def test_ggufs_rows_are_those_of_the_gguf_package() -> None:
    weight = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    for kind in ("Q8_0", "Q4_0", "Q5_1"):
        data = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
        packed = Packed(GgufBlocks(kind, COLUMNS), (ROWS, COLUMNS), {"blocks": torch.from_numpy(data)})
        out = torch.empty(ROWS, COLUMNS)

        expand(packed, out)

        expected = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compute", ["int8", "bf16"])
@pytest.mark.parametrize("name", PACKED)
def test_products_are_those_of_the_weight(name: str, compute: str, bias: bool) -> None:
    packed = PACKED[name]()
    added = torch.randn(ROWS).bfloat16() * packed.dequantize(torch.float32).norm() / 100 if bias else None
    layer = PackedLinear(packed, added, torch.bfloat16, compute=compute)
    x = torch.randn(2, 5, COLUMNS).bfloat16()
    expected = x.float() @ packed.dequantize(torch.float32).t() + (0 if added is None else added.float())

    y = layer(x)

    whole_row = packed.packing.name == "fp8" and packed.tensors.get("scale", torch.ones(1, 2)).shape[1] == 1
    kernel = "scale-after" if compute == "bf16" and whole_row else f"compiled-{compute}"
    assert layer.kernel(CPU).name == kernel
    assert y.shape == (2, 5, ROWS) and y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() / expected.norm() < {"int8": 0.02, "bf16": 0.006}[compute]


def test_auto_multiplies_large_layers_in_int8_where_the_cpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_int8, "_LARGE", ROWS)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    large = PackedLinear(nvfp4(), None, torch.bfloat16)
    wide = PackedLinear(nvfp4(), None, torch.float32)

    fine = PackedLinear(blocks("Q8_0"), None, torch.bfloat16)

    assert kernels.select(large, CPU).kernel.name == "compiled-int8"
    assert kernels.select(fine, CPU).kernel.name == "compiled-bf16"  # int8 activations would be the coarser ones
    assert kernels.select(wide, CPU).kernel.name == "compiled-bf16"  # whose activations nobody asked to round
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    assert kernels.select(large, CPU).kernel.name == "compiled-bf16"


def test_what_is_not_unpacked_says_why() -> None:
    padded = Packed(Nvfp4(columns=COLUMNS - 3), (ROWS, COLUMNS - 3), nvfp4().tensors)
    run_on = Packed(GgufBlocks("Q8_0", COLUMNS - 3), (ROWS, COLUMNS - 3), blocks("Q8_0").tensors)
    for packed, reason in ((padded, "do not end where the matrix does"), (run_on, "run on from row to row")):
        layer = PackedLinear(packed, None, torch.bfloat16)
        refusals = {r.kernel: r.reason for r in kernels.select(layer, CPU).refusals}
        assert reason in refusals["compiled-bf16"]
    layer = PackedLinear(nvfp4(), None, torch.float16)
    refusals = {r.kernel: r.reason for r in kernels.select(layer, CPU).refusals}
    assert refusals["compiled-bf16"] == "for activations in bfloat16 or float32"


@pytest.mark.parametrize("name", PACKED)
def test_tensors_that_are_too_small_are_not_read(name: str) -> None:
    packed = PACKED[name]()
    shared = ("smooth", "down", "up")
    cut = [key for key, tensor in packed.tensors.items() if key not in shared and len(tensor) > 1]
    for key in cut:
        tensors = {**packed.tensors, key: packed.tensors[key][:-1]}
        with pytest.raises((ValueError, RuntimeError)):
            expand(Packed(packed.packing, packed.shape, tensors), torch.empty(ROWS, COLUMNS))
    assert cut


def test_unpacked_weights_share_one_piece_of_memory() -> None:
    first, second = (PackedLinear(nvfp4(), None, torch.bfloat16, compute="int8") for _ in range(2))
    second.scratch = first.scratch
    x = torch.randn(3, COLUMNS).bfloat16()
    alone = first(x)

    second(x)

    assert torch.equal(first(x), alone)
    assert first.scratch.nbytes == ROWS * COLUMNS

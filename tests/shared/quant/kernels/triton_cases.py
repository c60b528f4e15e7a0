"""Triton's products of packed weights against the same in float64. Run by test_triton.py, as tests/shared/ops/
triton_cases.py is: on the interpreter in a process of its own, and on the GPU where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.ops.rounding import Kind, Rounded, round_rows
from shared.quant import kernels
from shared.quant.kernels import triton_expand
from shared.quant.kernels.scratch import Scratch
from shared.quant.kernels.triton_expand import FourBits
from shared.quant.kernels.triton_matmul import scaled_matmul
from shared.quant.packing import Packed
from tests.shared.quant.kernels.conftest import (
    COLUMNS,
    ROWS,
    MakeLayer,
    pack_fp8,
    pack_int8,
    pack_nvfp4,
    pack_svdq,
    swizzled,
)
from tests.support import block_scaled

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
KINDS: tuple[Kind, ...] = ("int8", "fp8")

each_kind = pytest.mark.parametrize("kind", KINDS)


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@each_kind
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "branch", "biased"),
    [
        (1, 16, 32, False, False),
        (19, 80, 160, False, True),  # none of them a multiple of a tile
        (40, 144, 128, True, True),
        (2, 16, 16, True, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scaled_matmul(
    kind: Kind, tokens: int, rows: int, columns: int, branch: bool, biased: bool, dtype: torch.dtype
) -> None:
    a, w = round_rows(matrix(tokens, columns, 0, dtype), kind), round_rows(matrix(rows, columns, 1), kind)
    bias = matrix(1, rows, 2, dtype)[0] if biased else None
    left, right = matrix(tokens, 48, 3, dtype), matrix(rows, 48, 4, dtype)

    got = scaled_matmul(a, w.codes, w.scale, bias, (left, right) if branch else None)

    expected = (a.codes.double() * a.scale) @ (w.codes.double() * w.scale).t()
    if branch:
        expected += left.double() @ right.double().t()
    if bias is not None:
        expected += bias.double()
    assert got.dtype == dtype
    # One rounding to 16 bits, cut off on the interpreter; sums of E4M3 are kept in float32.
    unit = 2**-7 if dtype == torch.bfloat16 else 2**-10
    torch.testing.assert_close(got.double(), expected, rtol=unit, atol=unit * 1e-2 + (0 if kind == "int8" else 1e-3))


@pytest.mark.parametrize("packed", [lambda: pack_svdq("int4"), lambda: pack_svdq("fp4"), lambda: pack_nvfp4(2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expanding_is_unpacking(packed: Callable[[], Packed], dtype: torch.dtype) -> None:
    weight = on_device(few_rows(packed()))
    expected = without_branch(weight)

    got = triton_expand.expand(FourBits.of(weight), torch.empty(weight.shape, dtype=dtype, device=DEVICE))

    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=0)


@each_kind
@pytest.mark.parametrize("packed", [lambda: pack_svdq("int4"), lambda: pack_svdq("fp4"), pack_nvfp4])
def test_expanding_to_8_bits_is_rounding_what_is_unpacked(kind: Kind, packed: Callable[[], Packed]) -> None:
    weight = on_device(few_rows(packed()))
    codes = torch.empty(weight.shape, dtype=triton_expand.codes_for(kind), device=DEVICE)

    scale = triton_expand.expand_rounded(FourBits.of(weight), codes)

    expected = round_rows(without_branch(weight).float(), kind)
    torch.testing.assert_close(scale, expected.scale, rtol=1e-5, atol=0)
    same = (codes.float() == expected.codes.float()).double().mean()
    assert same > 0.999  # a number halfway between two codes may go the other way
    error = (Rounded(codes, scale, torch.float32).restore() - without_branch(weight)).norm()
    assert error / without_branch(weight).norm() < (0.01 if kind == "int8" else 0.035)


def test_a_row_too_wide_for_one_stretch_is_expanded_whole() -> None:
    """Columns beyond one program's, and a number of rows and columns that fill none."""
    groups = 67
    codes = torch.arange(3 * groups * 8, device=DEVICE).to(torch.uint8).view(3, -1)
    scales = matrix(3, groups, 0)
    weight = FourBits(0, codes, scales, torch.ones(3, device=DEVICE), None, 16)

    got = triton_expand.expand(weight, torch.empty(3, groups * 16, device=DEVICE))

    signed = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).int()
    signed = torch.where(signed > 7, signed - 16, signed)
    torch.testing.assert_close(got, signed * scales.repeat_interleave(16, dim=1))


# Two roundings to 8 bits of normally distributed numbers, as in test_kernels.py, and for 4 bits a third of the weight.
@pytest.mark.parametrize(
    ("name", "packed", "limit"),
    [
        pytest.param("triton-int8", pack_int8, 0.014, id="int8"),
        pytest.param("triton-int8", lambda: pack_int8(64), 0.016, id="int8 ConvRot"),
        pytest.param("triton-fp8", pack_fp8, 0.04, id="fp8"),
        pytest.param("triton-fp8", lambda: pack_fp8(scaled="whole"), 0.04, id="fp8 one scale"),
        pytest.param("triton-fp8", lambda: pack_fp8(scaled="no"), 0.05, id="fp8 no scale"),
        pytest.param("triton-int8", lambda: few_rows(pack_svdq()), 0.02, id="svdq int8"),
        pytest.param("triton-int8", lambda: few_rows(pack_svdq("fp4")), 0.02, id="svdq fp4 int8"),
        pytest.param("triton-fp8", lambda: few_rows(pack_svdq()), 0.06, id="svdq fp8"),
        pytest.param("triton-int8", lambda: few_rows(pack_nvfp4(2)), 0.02, id="nvfp4 int8"),
        pytest.param("triton-fp8", lambda: few_rows(pack_nvfp4()), 0.06, id="nvfp4 fp8"),
        pytest.param("triton-expand", lambda: few_rows(pack_svdq()), 0.012, id="svdq expand"),
        pytest.param("triton-expand", lambda: few_rows(pack_nvfp4()), 0.012, id="nvfp4 expand"),
    ],
)
def test_the_product_is_right(
    name: str, packed: Callable[[], Packed], limit: float, make: MakeLayer, activations: Tensor
) -> None:
    layer = make(packed()).to(DEVICE)
    kernel = next(k for k in kernels.available(layer.packing.name) if k.name == name)
    assert kernel.refuse(layer, DEVICE) is None
    layer.use(kernel, DEVICE)
    x = activations.to(DEVICE)

    for given in (x, x[0, :1]):
        got = layer(given)

        expected = given.double() @ layer.packed.dequantize(torch.float32).double().t() + layer.bias.double()
        assert got.dtype == torch.bfloat16 and got.shape == expected.shape
        norms = expected.norm(dim=-1)
        assert float(((got.double() - expected).norm(dim=-1) / norms.where(norms > 0, 1)).max()) < limit


@each_kind
@pytest.mark.parametrize("many", [False, True])
def test_tokens_rounded_by_the_operation_before_give_the_same(kind: Kind, many: bool, make: MakeLayer) -> None:
    layer = make(pack_int8() if kind == "int8" else pack_fp8()).to(DEVICE)
    layer.use(next(k for k in kernels.available(kind) if k.name == f"triton-{kind}"), DEVICE)
    x = matrix(6 if many else 1, COLUMNS, 7, torch.bfloat16)

    assert layer.takes(DEVICE) == kind
    from shared.ops import fused

    assert torch.equal(layer(fused.round_rows(x, kind)), layer(x))


def test_4_bit_layers_share_one_piece_of_memory(make: MakeLayer) -> None:
    scratch = Scratch()
    layers = [make(few_rows(pack_svdq())).to(DEVICE), make(few_rows(pack_nvfp4())).to(DEVICE)]
    x = matrix(2, COLUMNS, 8, torch.bfloat16)

    for layer in layers:
        layer.scratch = scratch
        for name in ("triton-int8", "triton-expand"):
            layer.use(next(k for k in kernels.available(layer.packing.name) if k.name == name), DEVICE)
            layer(x)

    assert scratch.nbytes == 2 * layers[0].in_features * layers[0].out_features


@pytest.mark.parametrize("low_first", [False, True])
def test_scales_that_lie_as_files_have_them_are_read_so(low_first: bool) -> None:
    """144 rows are a band and a part of one, 10 blocks in a row two tiles and a half."""
    in_rows = block_scaled.nvfp4(1, 144, 160, low_first=low_first)[0]
    lying = on_device(swizzled(in_rows))
    whole = torch.empty(lying.shape, device=DEVICE)

    triton_expand.expand(FourBits.of(lying), whole)
    scale = triton_expand.expand_rounded(FourBits.of(lying), codes := torch.empty_like(whole, dtype=torch.int8))

    expected = in_rows.dequantize(torch.float32).to(DEVICE)
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(scale, round_rows(expected, "int8").scale, rtol=1e-5, atol=0)
    assert (codes * scale - expected).abs().max() <= scale.max() * 0.5001


def few_rows(packed: Packed) -> Packed:
    """Those around the middle, where pack_nvfp4(2) joins its matrices: the interpreter expands rows one by one."""
    return packed.take_rows(ROWS // 2 - 16, ROWS // 2 + 16)


def on_device(packed: Packed) -> Packed:
    return replace(packed, tensors={name: tensor.to(DEVICE) for name, tensor in packed.tensors.items()})


def without_branch(packed: Packed) -> Tensor:
    """The numbers of the 4-bit part, float64."""
    tensors: Any = dict(packed.tensors)
    if "down" in tensors:
        tensors |= {"down": torch.zeros_like(tensors["down"])}
    return replace(packed, tensors=tensors).dequantize(torch.float32).double()


def test_what_is_tuned_runs_and_is_right_with_other_options() -> None:
    """Every entry's works under one candidate that differs, at small sizes."""
    from shared.quant.kernels import tune

    sizes = tune.Sizes(width=64, hidden=80, heads=2, tokens=8, many=3)
    entries = tune.entries_for(DEVICE, 86, sizes)
    entries = [e for e in entries if e.bound is None or (e.kernel, e.bound) == ("row", 4096)]

    def small(entry: tune.Entry) -> tune.Entry:
        # Of small tiles: the interpreter takes its time for the others.
        first, second = sorted(
            entry.candidates, key=lambda o: (o.get("BLOCK_M", 0) * o.get("BLOCK_N", 0), *o.values())
        )[:2]
        return replace(entry, options=first, candidates=[second])

    found = list(tune.search(map(small, entries), lambda run: float(run() is None)))

    assert [(one.kernel, one.bound) for one in found] == [(entry.kernel, entry.bound) for entry in entries]
    assert not any(one.wrong for one in found)

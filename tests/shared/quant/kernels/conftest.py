"""Packed layers of every kind the kernels serve, small and the same each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from shared.quant import svdquant
from shared.quant.linear import PackedLinear
from shared.quant.packing import Packed, join_rows
from shared.quant.packings import fp8, int8
from shared.quant.packings.mxfp8 import Mxfp8
from shared.quant.packings.nvfp4 import Nvfp4
from shared.quant.packings.svdq import Svdq
from shared.quant.swizzle import swizzle, unswizzle

ROWS, COLUMNS = 128, 256

MakeLayer = Callable[..., PackedLinear]


def weight(seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02 * (seed + 1)


def pack_int8(rotation: int = 0) -> Packed:
    numbers = int8.rotate(weight(), rotation) if rotation else weight()
    return int8.pack(*int8.quantize(numbers), rotation)


def pack_fp8(kind: str = "e4m3fn", scaled: str = "rows") -> Packed:
    scale = None if scaled == "no" else fp8.scale_for(weight(), kind, (1,) if scaled == "rows" else None).reshape(-1, 1)
    return fp8.pack(fp8.cast(weight() if scale is None else weight() / scale, kind), scale)


def pack_nvfp4(parts: int = 1, *, low_first: bool = False) -> Packed:
    """parts: matrices of different tensor scales, joined. low_first: as LightX2V packs them."""
    import comfy_kitchen

    packed = []
    for seed in range(parts):
        numbers = weight(seed, ROWS // parts)
        scale = numbers.abs().amax() / (448 * 6)
        codes, stored = comfy_kitchen.quantize_nvfp4(numbers, scale, hi_first=not low_first)
        block_scales = unswizzle(stored.view(torch.uint8), len(numbers), COLUMNS // 16)
        tensors = {"codes": codes, "block_scales": block_scales, "tensor_scale": scale.expand(len(numbers), 1)}
        packed.append(Packed(Nvfp4(low_first=low_first), (len(numbers), COLUMNS), tensors))
    joined = join_rows(packed)
    assert joined is not None
    return joined


def swizzled(packed: Packed) -> Packed:
    """The same as files have it."""
    assert isinstance(packed.packing, Nvfp4 | Mxfp8)
    name = packed.packing.scales
    tensors = {**packed.tensors, name: swizzle(packed.tensors[name])}
    return Packed(replace(packed.packing, swizzled=True), packed.shape, tensors)


def pack_mxfp8() -> Packed:
    import comfy_kitchen

    values, stored = comfy_kitchen.quantize_mxfp8(weight())
    exponents = unswizzle(stored.view(torch.uint8), ROWS, COLUMNS // 32)
    return Packed(Mxfp8(), (ROWS, COLUMNS), {"codes": values.view(torch.uint8), "exponents": exponents})


def pack_svdq(kind: str = "int4") -> Packed:
    smooth = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(3)) + 0.5
    group = 64 if kind == "int4" else 16
    tensors = svdquant.fit(weight(), kind=kind, rank=16, group=group, smooth=smooth, iterations=0, parts=1)  # type: ignore[arg-type]
    return Packed(Svdq(kind), (ROWS, COLUMNS), tensors)  # type: ignore[arg-type]


@pytest.fixture
def make() -> MakeLayer:
    """make(packed, dtype=bfloat16, compute="auto", bias=True): a layer."""

    def layer(
        packed: Packed, dtype: torch.dtype = torch.bfloat16, compute: str = "auto", *, bias: bool = True
    ) -> PackedLinear:
        offsets = torch.randn(packed.shape[0], generator=torch.Generator().manual_seed(4)).to(dtype)
        return PackedLinear(packed, offsets if bias else None, dtype, compute=compute)

    return layer


@pytest.fixture
def activations() -> torch.Tensor:
    """(2, 20, COLUMNS) bfloat16, not contiguous, its tokens of very different size, one of zeros."""
    x = torch.randn(20, 2, COLUMNS, generator=torch.Generator().manual_seed(5)).transpose(0, 1)
    x = x * torch.logspace(-2, 2, 20)[:, None]
    x[0, 3] = 0
    return x.to(torch.bfloat16)

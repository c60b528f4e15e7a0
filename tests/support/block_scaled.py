"""Matrices that comfy-kitchen quantized, in our packings, and what comfy-kitchen says they stand for, in float32."""

from __future__ import annotations

import comfy_kitchen
import torch

from shared.quant.packing import Packed
from shared.quant.packings.mxfp8 import Mxfp8
from shared.quant.packings.nvfp4 import Nvfp4
from shared.quant.swizzle import padded_shape, unswizzle

ROWS, COLUMNS = 160, 96


def mxfp8(
    seed: int, rows: int = ROWS, columns: int = COLUMNS, *, swizzled: bool = False
) -> tuple[Packed, torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02 * seed
    weight[0, :32] = 0.0
    values, stored = comfy_kitchen.quantize_mxfp8(weight, pad_32x=True)
    theirs = comfy_kitchen.dequantize_mxfp8(values, stored, torch.float32)
    exponents = _scales(stored, rows, values.shape[1] // 32, swizzled=swizzled)
    padded = values.shape[1] > columns
    tensors = {"codes": values[:rows].view(torch.uint8), "exponents": exponents}
    packing = Mxfp8(columns if padded else None, swizzled=swizzled)
    return Packed(packing, (rows, columns), tensors), theirs[:rows, :columns]


def nvfp4(
    seed: int, rows: int = ROWS, columns: int = COLUMNS, *, swizzled: bool = False, low_first: bool = False
) -> tuple[Packed, torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02 * seed
    scale = weight.abs().amax() / (448 * 6)
    codes, stored = comfy_kitchen.quantize_nvfp4(weight, scale, pad_16x=True, hi_first=not low_first)
    theirs = comfy_kitchen.dequantize_nvfp4(codes, scale, stored, torch.float32, hi_first=not low_first)
    tensors = {
        "codes": codes[:rows],
        "block_scales": _scales(stored, rows, codes.shape[1] // 8, swizzled=swizzled),
        "tensor_scale": scale.expand(rows, 1).contiguous(),
    }
    padded = codes.shape[1] * 2 > columns
    packing = Nvfp4(columns if padded else None, swizzled=swizzled, low_first=low_first)
    return Packed(packing, (rows, columns), tensors), theirs[:rows, :columns]


def _scales(stored: torch.Tensor, rows: int, blocks: int, *, swizzled: bool) -> torch.Tensor:
    stored = stored.view(torch.uint8)
    return stored[: padded_shape(rows, blocks)[0]] if swizzled else unswizzle(stored, rows, blocks)

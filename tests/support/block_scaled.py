"""Matrices that comfy-kitchen quantized, in our packings, and what comfy-kitchen says they stand for, in float32."""

from __future__ import annotations

import comfy_kitchen
import torch

from shared.quant.packing import Packed
from shared.quant.packings.mxfp8 import Mxfp8
from shared.quant.packings.nvfp4 import Nvfp4
from shared.quant.swizzle import unswizzle

ROWS, COLUMNS = 160, 96


def mxfp8(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Packed, torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02 * seed
    weight[0, :32] = 0.0
    values, stored = comfy_kitchen.quantize_mxfp8(weight, pad_32x=True)
    theirs = comfy_kitchen.dequantize_mxfp8(values, stored, torch.float32)
    exponents = unswizzle(stored.view(torch.uint8), rows, values.shape[1] // 32)
    padded = values.shape[1] > columns
    tensors = {"codes": values[:rows].view(torch.uint8), "exponents": exponents}
    return Packed(Mxfp8(columns if padded else None), (rows, columns), tensors), theirs[:rows, :columns]


def nvfp4(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Packed, torch.Tensor]:
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

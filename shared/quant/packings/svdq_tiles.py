"""SVDQuant in the tiles that nunchaku's engine reads: the numbers of svdq.py in the order of its tiling.

    qweight (N, K/2) int8   wscales (G, N)   smooth_factor (K,)   proj_down (K, R)   proj_up (N, R)
    wcscales (N,)           fp4 only: row_scale

svdq_tiling.py explains the tiles; N and K are multiples of 128, R of 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.quant import svdq_tiling as tiling
from shared.quant.packing import Packed
from shared.quant.packings.svdq import Kind, Svdq


@dataclass(frozen=True)
class SvdqTiles:
    """As Svdq of this kind, tiled."""

    kind: Kind

    @property
    def name(self) -> str:
        return "svdq"

    @staticmethod
    def of(packed: Packed) -> Packed:
        """The same numbers in tiles. Row scales are rounded to the type of the smoothing, as a file has them."""
        assert isinstance(packed.packing, Svdq)
        return Packed(SvdqTiles(packed.packing.kind), packed.shape, _tiled(packed.tensors, packed.packing.kind))

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return Svdq(self.kind).dequantize(_natural(tensors), dtype)

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        return _tiled(Svdq(self.kind).take_rows(_natural(tensors), start, stop), self.kind)

    def join_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        joined = Svdq(self.kind).join_rows([_natural(tensors) for tensors in parts])
        return None if joined is None else _tiled(joined, self.kind)


def _tiled(natural: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    rows, columns = natural["codes"].shape[0], natural["codes"].shape[1] * 2
    words = natural["codes"].contiguous().view(torch.int32)
    scales, down, up, smooth = (natural[name] for name in ("scales", "down", "up", "smooth"))
    if scales.dtype == torch.float8_e4m3fn:
        tiled = tiling.MICRO_SCALES.to_file(scales.view(torch.uint8)).view(scales.dtype)
    else:
        tiled = tiling.SCALES.to_file(scales)
    result = {
        "qweight": tiling.WORDS.to_file(words).view(torch.int8).view(rows, columns // 2),
        "wscales": tiled.view(-1, rows),
        "smooth_factor": tiling.SCALES.to_file(smooth[:, None]),
        "proj_down": tiling.DOWN.to_file(down).view(columns, len(down)),
        "proj_up": tiling.UP.to_file(up).view(rows, len(down)),
    }
    if kind == "fp4":
        result["wcscales"] = tiling.SCALES.to_file(natural["row_scale"].to(smooth.dtype))
    return result


def _natural(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    qweight, down = tensors["qweight"], tensors["proj_down"]
    rows, columns, rank = len(qweight), qweight.shape[1] * 2, down.shape[1]
    words = tiling.WORDS.to_natural(qweight.view(torch.int32), rows, columns // 8)
    row_scale = torch.ones(rows, 1, device=qweight.device)
    if "wcscales" in tensors:
        row_scale = tiling.unpack_scales(tensors["wcscales"], rows, 1).float()
    return {
        "codes": words.view(torch.uint8),
        "scales": tiling.unpack_scales(tensors["wscales"], rows, len(tensors["wscales"])),
        "row_scale": row_scale,
        "smooth": tiling.unpack_scales(tensors["smooth_factor"], columns, 1).flatten(),
        "down": tiling.DOWN.to_natural(down, rank, columns),
        "up": tiling.UP.to_natural(tensors["proj_up"], rows, rank),
    }

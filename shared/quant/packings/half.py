"""Plain numbers of 16 bits that stay so where products are made in float32: a packing of factor two.

A CPU without bfloat16 instructions computes in float32. A 16-bit file made float32 as a whole would take twice its size
in memory of the program's own; kept as it is, it stays mapped, and each product widens the weight that it multiplies.
Widening is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Half:
    """Tensor: `numbers` (rows, columns), bfloat16 or float16."""

    name = "16-bit"

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return tensors["numbers"].to(dtype)

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        return {"numbers": tensors["numbers"][start:stop]}

    def join_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        import torch

        numbers = [part["numbers"] for part in parts]
        return {"numbers": torch.cat(numbers)} if len({n.dtype for n in numbers}) == 1 else None

"""E2M1, the 4-bit float of NVFP4: a sign, two bits of exponent, one of mantissa, and so these sixteen numbers.

    code    0   1    2   3    4   5   6   7     8 to 15: the same with a minus
    value   0  0.5   1  1.5   2   3   4   6

Two codes share a byte. Which of them comes first differs between formats; here it is the high half, unless said.
Source: OCP Microscaling Formats (MX) 1.0, section 5.3.3.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MAX = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def encode(numbers: Tensor) -> Tensor:
    """The nearest codes (uint8, 0 to 15) of float32 numbers; ties go to the even code, beyond 6 saturates."""
    size = numbers.abs()
    # Between 0 and 2 values lie 0.5 apart, up to 4 they lie 1 apart, up to 6 they lie 2 apart. torch.round sends ties
    # to even, and each piece begins at an even code.
    beyond_2 = torch.where(size < 4, size.round() + 2, (size / 2).round() + 4)
    codes = torch.where(size < 2, (size * 2).round(), beyond_2)
    return codes.clamp(max=7).to(torch.uint8) | (numbers.signbit().to(torch.uint8) << 3)


def pack(codes: Tensor) -> Tensor:
    """Codes (rows, columns), columns even, two to a byte (rows, columns / 2): the even column in the high half."""
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def unpack_values(packed: Tensor, *, low_first: bool = False) -> Tensor:
    """The numbers, float32 (rows, columns), of packed bytes (rows, columns / 2)."""
    pairs = torch.nn.functional.embedding(packed.int(), _pairs(packed.device, low_first))
    return pairs.view(packed.shape[0], packed.shape[1] * 2)


@cache
def _pairs(device: torch.device, low_first: bool) -> Tensor:
    """(256, 2) float32: the two numbers that each byte stands for. One lookup a byte, not two."""
    high, low = torch.tensor(VALUES).expand(16, 16).t(), torch.tensor(VALUES).expand(16, 16)
    return torch.stack([low, high] if low_first else [high, low], dim=-1).reshape(256, 2).to(device)

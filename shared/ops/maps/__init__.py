"""What stands between a decoder's convolutions, on activations as they lie channels-last: three operations.

    settle      a convolution's result finished: bias, skip connection, doubled pixels put in their places; and, while
                the numbers are at hand, their sums for the norm that comes next
    factors     GroupNorm as a factor and a summand for each channel, from such sums
    normalise   x * factor + summand, and SiLU of it

A GroupNorm needs the sums of all of a picture before its first pixel. Kept apart from the numbers, they can come from
bands of rows, one after the other, while nothing of the picture is in memory but a band.

eager.py is what they mean, in torch. fused.py does each in one pass over the memory, by Triton on NVIDIA GPUs; there
plain torch makes six to nine, and a float32 copy. `implementation()` chooses.

Shape legend:  H rows   W columns   C channels   G groups   n parts that were summed up apart
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from shared.ops import triton_ready
from shared.ops.maps import eager

log = logging.getLogger(__name__)


class MapOperations(Protocol):
    """A module with the three operations, for inference."""

    def settle(
        self, x: Tensor, *, bias: Tensor | None, skip: Tensor | None, out: Tensor | None, groups: int,
        doubled: bool = False,
    ) -> Tensor:  # fmt: skip
        """out = x + bias + skip; returns the sums (n, 2, G) of that and of its squares, as it is rounded.

        x: (H, W, C), or doubled: (H / 2 + 1, W / 2 + 1, 4 * C), of which out[2 i + a, 2 j + b] is
        x[i + a, j + b] of the channels from (2 a + b) * C on. bias: (C,). skip, out: (H, W, C); out may be x or skip,
        None keeps nothing but the sums.
        """

    def factors(
        self, sums: Sequence[Tensor], count: int, weight: Tensor, bias: Tensor, eps: float,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(factor, summand) of each channel, float32 (C,): GroupNorm(x + before) = x * factor + summand.

        sums: of parts that together are the map x + before, n each. count: pixels of the map. weight, bias: (C,) of
        the norm. before: (C,), what is in the sums and not in the x that will be normalised.
        """

    def normalise(self, x: Tensor, factor: Tensor, summand: Tensor, out: Tensor, *, silu: bool = True) -> None:
        """out = silu(x * factor + summand) for x, out (H, W, C); without SiLU if that is said."""


def implementation(device: torch.device) -> MapOperations:
    """The module whose functions serve tensors on `device`."""
    if device.type != "cuda" or triton_ready.why_not(device) is not None:
        return eager
    return _tried(device)


@cache
def _tried(device: torch.device) -> MapOperations:
    from shared.ops.maps import fused

    try:
        with triton_ready.launching():
            wrong = fused.wrong_operations(device)
    except RuntimeError as fault:
        log.warning("A decode's norms are left to torch: Triton's do not run here (%s).", fault)
        return eager
    if wrong:
        log.warning("A decode's norms are left to torch: Triton's give wrong numbers here (%s).", ", ".join(wrong))
    return eager if wrong else fused

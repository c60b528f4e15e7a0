"""Weights of small blocks as oneDNN reads them, kept beside the network's own: what a CPU multiplies bfloat16 by.

oneDNN wants a matrix in tiles of its own order. torch puts each weight into that order anew at every product: a fifth
of the product's time at 64 tokens, a tenth at 320, 3 % at a real picture's thousands. The same bits come out. Kept is a
second copy, so it is for networks whose weights are little beside what a program takes anyway; a real block of 354 MB
stays as it lies in its file.

A weight that is replaced or written to is laid out anew at the next product.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.z_image.cpu_attention import multiplies_bfloat16

BLOCK_BYTES = 2**24
"""Most that the weights of a block may take: up to width 768, half a gigabyte for 34 blocks."""


class _Kept(NamedTuple):
    """How weights lay when they were laid out, and the result: themselves where there is nothing to gain."""

    stamps: tuple[tuple[int, int], ...]
    weights: tuple[Tensor, ...]


_of_blocks: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def weights_of(block: nn.Module, weights: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    """What product() takes in the place of these (N, K) weights of a block. rows: of what will be multiplied."""
    kept = _of_blocks.get(block)
    if kept is None or kept.stamps != _stamps(weights):
        kept = _Kept(
            _stamps(weights), tuple(_laid_out(weight, rows) for weight in weights) if _gains(weights) else weights
        )
        _of_blocks[block] = kept
    return kept.weights


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, K) times one of weights_of(), (rows, N)."""
    if weight.is_mkldnn:
        result: Tensor = _multiply()(x, weight, None, "none", [], "")
        return result
    return F.linear(x, weight)


def _stamps(weights: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    """Different once a weight is another, lies elsewhere or was written to."""
    return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)


def _gains(weights: tuple[Tensor, ...]) -> bool:
    return (
        all(weight.dtype == torch.bfloat16 and not weight.is_inference() for weight in weights)
        and sum(weight.nbytes for weight in weights) <= BLOCK_BYTES
        and multiplies_bfloat16()
        and torch.backends.mkldnn.is_available()
    )


def _laid_out(weight: Tensor, rows: int) -> Tensor:
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return result


@cache
def _multiply() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default

"""Weights kept as oneDNN reads them multiply to the same bits, and never outlive what they were made of."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.z_image import laid_out
from models.z_image.cpu_attention import multiplies_bfloat16
from models.z_image.laid_out import product, weights_of

needs_bfloat16 = pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU does not multiply bfloat16")
SHAPES = ((384, 128), (128, 128), (682, 128), (128, 341))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def four(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    return tuple(nn.Parameter(torch.randn(shape).to(dtype), requires_grad=False) for shape in SHAPES)


@needs_bfloat16
@pytest.mark.parametrize("rows", [1, 64, 96, 320])
def test_products_have_the_bits_of_torchs_own(rows: int) -> None:
    weights = four()

    for weight, kept in zip(weights, weights_of(nn.Module(), weights, 64), strict=True):
        x = torch.randn(rows, weight.shape[1]).bfloat16()
        assert kept.is_mkldnn
        assert torch.equal(product(x, kept), F.linear(x, weight))


@needs_bfloat16
def test_they_are_laid_out_once() -> None:
    block, weights = nn.Module(), four()
    first = weights_of(block, weights, 64)

    assert weights_of(block, weights, 64) is first


@needs_bfloat16
@pytest.mark.parametrize("how", ["replaced", "written to", "moved"])
def test_a_weight_that_changes_is_laid_out_anew(how: str) -> None:
    block, weights = nn.Module(), four()
    x = torch.randn(64, 128).bfloat16()
    before = product(x, weights_of(block, weights, 64)[0])
    other = torch.randn(SHAPES[0]).bfloat16()
    if how == "replaced":
        weights = (nn.Parameter(other, requires_grad=False), *weights[1:])
    elif how == "written to":
        weights[0].copy_(other)
    else:
        weights[0].data = other

    after = product(x, weights_of(block, weights, 64)[0])

    assert not torch.equal(before, after)
    assert torch.equal(after, F.linear(x, other))


@pytest.mark.parametrize("why", ["float32", "large", "made for inference"])
def test_what_gains_nothing_stays_as_it_is(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "large":
        monkeypatch.setattr(laid_out, "BLOCK_BYTES", 1000)
    with torch.inference_mode(why == "made for inference"):
        weights = four(torch.float32 if why == "float32" else torch.bfloat16)

    assert all(kept is own for kept, own in zip(weights_of(nn.Module(), weights, 64), weights, strict=True))


@needs_bfloat16
def test_it_goes_with_its_block_and_is_not_copied_with_it() -> None:
    block, weights = nn.Linear(1, 1), four()
    weights_of(block, weights, 64)
    count = len(laid_out._of_blocks)
    twin = copy.deepcopy(block)

    assert len(laid_out._of_blocks) == count
    del block
    gc.collect()
    assert len(laid_out._of_blocks) == count - 1
    assert twin is not None

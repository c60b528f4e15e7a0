"""The three operations by Triton: the same functions as eager.py, each one pass over the memory.

Maps of numbers that lie without gaps; channels and groups are powers of two, others are left to torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from shared.ops import tuning
from shared.ops.maps import eager, kernels
from shared.ops.triton_ready import capability

_LARGEST_ERROR = 0.01  # rounding to bfloat16 once more or less makes 0.3 %


def settle(
    x: Tensor, *, bias: Tensor | None, skip: Tensor | None, out: Tensor | None, groups: int, doubled: bool = False
) -> Tensor:
    """See shared.ops.maps. The sums are float32, one for each program."""
    height, width, channels = eager.shape_of(x, doubled)
    if not _fits(channels, groups):
        return eager.settle(x, bias=bias, skip=skip, out=out, groups=groups, doubled=doubled)
    assert x.is_contiguous()
    assert all(other is None or other.is_contiguous() for other in (skip, out))
    pixels = height * width
    launch, programs = _launch(x, pixels, channels)
    sums = torch.empty(programs, 2, groups, dtype=torch.float32, device=x.device)
    kernels.settle[(programs,)](
        x, x if bias is None else bias, x if skip is None else skip, x if out is None else out, sums, pixels, width,
        HAS_BIAS=bias is not None, HAS_SKIP=skip is not None, KEEP=out is not None, DOUBLED=doubled,
        CHANNELS=channels, GROUPS=groups, **launch,
    )  # fmt: skip
    return sums


def factors(
    sums: Sequence[Tensor], count: int, weight: Tensor, bias: Tensor, eps: float, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See shared.ops.maps."""
    channels, groups = len(weight), sums[0].shape[2]
    if not _fits(channels, groups):
        return eager.factors(sums, count, weight, bias, eps, before)
    total = (sums[0] if len(sums) == 1 else torch.cat(list(sums))).sum(0, dtype=torch.float64)
    factor, summand = torch.empty(2, channels, dtype=torch.float32, device=weight.device).unbind()
    kernels.factors[(1,)](
        total, weight, bias, bias if before is None else before, factor, summand, count * (channels // groups), eps,
        HAS_BEFORE=before is not None, CHANNELS=channels, GROUPS=groups,
    )  # fmt: skip
    return factor, summand


def normalise(x: Tensor, factor: Tensor, summand: Tensor, out: Tensor, *, silu: bool = True) -> None:
    """See shared.ops.maps."""
    height, width, channels = x.shape
    if not _fits(channels, 1):
        eager.normalise(x, factor, summand, out, silu=silu)
        return
    assert x.is_contiguous()
    assert out.is_contiguous()
    launch, programs = _launch(x, height * width, channels)
    kernels.normalise[(programs,)](
        x, factor, summand, out, height * width, SILU=silu, CHANNELS=channels, **launch
    )  # fmt: skip


def wrong_operations(device: torch.device) -> list[str]:
    """The operations whose numbers differ from eager.py's on `device`, by name; none as a rule."""
    groups, channels = 32, 128
    generator = torch.Generator("cpu").manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        # "cpu" said aloud: an offloader may have made the GPU torch's default.
        return torch.randn(*shape, generator=generator, device="cpu").to(device, torch.bfloat16)

    x, places, skip = numbers(6, 10, channels), numbers(4, 6, 4 * channels), numbers(6, 10, channels)
    weight, bias = numbers(channels), numbers(channels)

    def results(by: Any) -> dict[str, Tensor]:
        out, doubled, normed = (torch.empty_like(x) for _ in range(3))
        sums = by.settle(x, bias=bias, skip=skip, out=out, groups=groups)
        by.settle(places, bias=bias, skip=None, out=doubled, groups=groups, doubled=True)
        factor, summand = by.factors([sums], 60, weight, bias, 1e-6, bias)
        by.normalise(out, factor, summand, normed)
        return {"settle": out, "settle, doubled": doubled, "factors": factor, "normalise": normed}

    expected = results(eager)
    return [
        name
        for name, got in results(SimpleNamespace(settle=settle, factors=factors, normalise=normalise)).items()
        if not float((got - expected[name]).float().norm() / expected[name].float().norm()) <= _LARGEST_ERROR  # or NaN
    ]


def _fits(channels: int, groups: int) -> bool:
    return channels & (channels - 1) == 0 and groups & (groups - 1) == 0


def _launch(x: Tensor, pixels: int, channels: int) -> tuple[dict[str, Any], int]:
    """The launch options, and how many programs it takes."""
    options = tuning.launch("map", capability(x.device), channels)
    at_once = max(1, options.pop("NUMBERS") // channels)
    return {"PIXELS": at_once, **options}, -(-pixels // at_once)

"""Ways to compute softmax(q k^T / sqrt(E)) v on an NVIDIA GPU, by name, and which of them is fastest there.

    sdpa       torch's own choice among flash, memory-efficient and plain: always there
    cudnn      the same interface held to cuDNN's kernel
    flash      flash-attn 2        flash3     flash-attn 3, for Hopper        xformers   xformers' own choice
    sage       SageAttention 1     sage2      SageAttention 2: both round queries and keys to 8 bits

auto takes the fastest of those that round nothing more than torch does: published figures differ by card, driver and
torch, so they race on the device when the model is loaded. Those that round are for whoever asks for them by name.

Shape legend:  B batch   S tokens   H heads   E head width
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

TOKENS = 4224  # a 1024x1024 picture with a caption of 128 tokens
TIMES, WARM_UP = 5, 2
# Relative error against torch's own on normally distributed numbers, both rounded to 16 bits: 0.2 to 0.4 %.
LARGEST_ERROR = 0.02

# How a backend fails that is installed and does not fit its neighbours or this card.
FAULTS = (RuntimeError, ImportError, OSError, TypeError, ValueError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Backend:
    """One way. run: q, k, v (B, H, S, E) of one type, any strides, -> (B, H, S, E). rounds: to 8 bits inside."""

    name: str
    run: Attend
    rounds: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What was chosen, and what the race said of each, in words."""

    backend: Backend
    words: str


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own choice."""
    return F.scaled_dot_product_attention(q, k, v)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return _by_tokens(flash_attn_func, q, k, v)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return _by_tokens(flash_attn_func, q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers import ops  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return _by_tokens(ops.memory_efficient_attention, q, k, v)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn  # type: ignore[import-not-found, import-untyped, unused-ignore]

    result: Tensor = sageattn(q, k, v, tensor_layout="HND", is_causal=False)
    return result


def _by_tokens(attend: Callable[..., Tensor | tuple[Tensor, ...]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Through a function over (B, S, H, E), which may give the sums of the softmax as well."""
    result = attend(*(x.transpose(1, 2) for x in (q, k, v)))
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)


SDPA = Backend("sdpa", sdpa)
BACKENDS = {
    backend.name: backend
    for backend in (
        SDPA,
        Backend("cudnn", _cudnn),
        Backend("flash", _flash),
        Backend("flash3", _flash3),
        Backend("xformers", _xformers),
        Backend("sage", _sage, rounds=True),
        Backend("sage2", _sage, rounds=True),
    )
}


def plain_is_wanted() -> bool:
    """Whether somebody has narrowed torch's own choice, to plain products: then no other way is to be taken."""
    return not torch.backends.cuda.flash_sdp_enabled()


@cache
def fastest(candidates: tuple[Backend, ...], device: torch.device, dtype: torch.dtype, heads: int, width: int) -> Found:
    """The fastest of these for attention of this kind on `device`; sdpa where nothing is faster. Takes milliseconds.

    A candidate that fails or gives other numbers than sdpa is passed over, and its fault told.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1, heads, TOKENS, width)
    q, k, v = (torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for _ in range(3))
    expected = sdpa(q, k, v).float()
    fit, said = [SDPA], []
    for candidate in candidates:
        if candidate.name == SDPA.name:
            continue
        try:
            error = float((candidate.run(q, k, v).float() - expected).norm() / expected.norm())
        except FAULTS as fault:
            said.append(f"{candidate.name} fails ({(str(fault).splitlines() or [type(fault).__name__])[0]})")
            continue
        if error <= LARGEST_ERROR:  # not for NaN
            fit.append(candidate)
        else:
            said.append(f"{candidate.name} gives wrong numbers (relative error {error:.2g})")
    least = _race([lambda one=one: one.run(q, k, v) for one in fit], device)  # type: ignore[misc]
    chosen = fit[min(range(len(fit)), key=least.__getitem__)]
    times = [f"{backend.name} {1e3 * seconds:.2f} ms" for backend, seconds in zip(fit, least, strict=True)]
    return Found(chosen, "; ".join([", ".join(times), *said]))


def _race(ways: list[Callable[[], Tensor]], device: torch.device) -> list[float]:
    """The least seconds of each, taken in turns."""
    least = [float("inf")] * len(ways)
    for turn in range(WARM_UP + TIMES):
        for place, way in enumerate(ways):
            _wait(device)
            began = time.perf_counter()
            way()
            _wait(device)
            if turn >= WARM_UP:
                least[place] = min(least[place], time.perf_counter() - began)
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

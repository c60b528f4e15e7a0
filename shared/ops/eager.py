"""The four operations in plain torch: their meaning, and what runs wherever nothing better is written.

There are two ways through each. With gradients wanted it is the formula, written out. For inference it is written for
a CPU, where a pass over the activations and a large temporary cost more than arithmetic (torch's own rms_norm makes
five of them: 26 ms against 3.5 ms for 1024 bfloat16 tokens of width 3840 on one core): one float32 copy of some tokens
at a time, worked on in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens below which a CPU's queries, keys and values are left in float32: torch's attention takes 10 to 30 % less time
# in it than in bfloat16, up to where models.z_image.cpu_attention begins.
SHORT = 512

# Tokens that a CPU works on at once. Each is worked on by itself, so the numbers are the same for any; this many of a
# 6B model's, in float32, take 8 MB and not as much again as all that is kept.
_AT_ONCE = 512


def rms_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, exact: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """See shared.ops. dtype: of the result, None for x's."""
    if exact or _trains(x, weight, scale):
        normed = rms_norm(x, weight, eps, exact=exact)
        return (normed if scale is None else normed * scale).to(dtype or x.dtype)
    dtype = dtype or x.dtype
    if not _is_cut(x):
        return _modulated(x, weight, scale, eps).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    for place, some, factor in _parts(x, out, x, scale):
        place.copy_(_modulated(some, weight, factor, eps))
    return out


def gate_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, *, exact: bool = False
) -> Tensor:
    """See shared.ops."""
    if exact or _trains(x, y, weight, gate):
        normed = rms_norm(y, weight, eps, exact=exact)
        return x + (normed if gate is None else gate * normed)
    if not _is_cut(x):
        return _gated(x, y, gate, weight, eps).to(x.dtype)
    out = torch.empty_like(x)
    for place, stream, some, factor in _parts(x, out, x, y, gate):
        place.copy_(_gated(stream, some, factor, weight, eps))
    return out


def qk_norm_rope(
    qkv: Tensor, qk_weight: Tensor, rope: Tensor, n_heads: int, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See shared.ops. Short sequences are handed on in float32, in which torch's attention is faster for them."""
    batch, tokens, _ = qkv.shape
    if exact or _trains(qkv, qk_weight):
        q, k, v = qkv.view(batch, tokens, 3, n_heads, -1).unbind(2)
        q = rotate(rms_norm(q, qk_weight[0], eps, exact=exact), rope)
        k = rotate(rms_norm(k, qk_weight[1], eps, exact=exact), rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    wide = qkv.float() if tokens < SHORT and qkv.is_cpu else qkv
    split = wide.view(batch, tokens, 3, n_heads, -1)
    for some, turns in _parts(qkv, split.narrow(2, 0, 2), _turns(rope)):
        both = some.float()  # of float32 numbers these themselves
        both.div_(_rms(both, eps)).mul_(qk_weight.unsqueeze(1))
        torch.view_as_complex(both.view(batch, both.shape[1], 2 * n_heads, -1, 2)).mul_(turns)
        if both is not some:
            some.copy_(both)
    q, k, v = split.transpose(1, 3).unbind(2)
    return q, k, v


def swiglu(w13: Tensor) -> Tensor:
    """See shared.ops."""
    gate, value = w13.chunk(2, dim=-1)
    return F.silu(gate) * value if _trains(w13) else F.silu(gate).mul_(value)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, exact: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, float32 inside; exact rounds before the weight as well."""
    if not exact:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(weight.dtype) * weight


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i + 1]) by its angle in float32: x (B, S, H, E), rope as in shared.ops; x's type."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * _turns(rope)).flatten(-2).type_as(x)


def _modulated(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """rms_norm_modulate() before it is rounded: float32."""
    y = _normalised(x, eps).mul_(weight)
    return y if scale is None else y.mul_(scale)


def _gated(x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """gate_residual() before it is rounded: float32."""
    wide = y.float()
    length = _length(wide, eps)
    added = wide * weight if wide is y else wide.mul_(weight)
    if gate is not None:
        added.mul_(gate)
    return torch.addcdiv(x, added, length, value=math.sqrt(y.shape[-1]))


def _is_cut(x: Tensor) -> bool:
    """Whether x (B, S, ...) has more tokens than are worked on at once."""
    return x.is_cpu and x.shape[1] > _AT_ONCE


def _parts(x: Tensor, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Tensors whose second axis has the length S or 1, cut along it into as many tokens as a CPU takes at once.

    x: (B, S, ...), whose device and S count. None and what is the same for all tokens come with every part.
    """
    if not _is_cut(x):
        yield tensors
        return
    tokens = x.shape[1]
    for first in range(0, tokens, _AT_ONCE):
        count = min(_AT_ONCE, tokens - first)
        yield tuple(t if t is None or t.shape[1] == 1 else t.narrow(1, first, count) for t in tensors)


def _normalised(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis: float32, and the caller's to change."""
    wide = x.float()
    rms = _rms(wide, eps)
    return torch.div(wide, rms) if wide is x else wide.div_(rms)


def _rms(wide: Tensor, eps: float) -> Tensor:
    """sqrt(mean(x^2) + eps) over the last axis of float32 numbers, that axis kept with length 1."""
    return _length(wide, eps).mul_(_constant(wide.shape[-1] ** -0.5))


def _length(wide: Tensor, eps: float) -> Tensor:
    """sqrt(sum(x^2) + n eps) of the n float32 numbers along the last axis: sqrt(n) times _rms()."""
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return length.hypot_(_constant(math.sqrt(wide.shape[-1] * eps)))


def _turns(rope: Tensor) -> Tensor:
    """(B or 1, S, 1, E / 2) complex."""
    return rope if rope.is_complex() else torch.view_as_complex(rope)


def _constant(value: float) -> Tensor:
    """A scalar on the CPU, which every device takes as an argument; a Python number is made one at every call."""
    known = _constants.get(value)
    if known is None:
        known = torch.tensor(value, dtype=torch.float32, device="cpu")
        if type(known) is Tensor:  # and no stand-in of a mode that only works out shapes
            _constants[value] = known
    return known


_constants: dict[float, Tensor] = {}


def _trains(*tensors: Tensor | None) -> bool:
    """Whether somebody wants a gradient through these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

"""The four operations in plain torch: their meaning, and what runs wherever nothing better is written.

There are two ways through each. With gradients wanted it is the formula, written out. For inference it is written for
a CPU, where a pass over the activations and a large temporary cost more than arithmetic (torch's own rms_norm makes
five of them: 26 ms against 3.5 ms for 1024 bfloat16 tokens of width 3840 on one core): one float32 copy, worked on in
place.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_modulate(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, exact: bool = False) -> Tensor:
    """See shared.ops."""
    if exact or _trains(x, weight, scale):
        normed = rms_norm(x, weight, eps, exact=exact)
        return normed if scale is None else normed * scale
    y = _normalised(x, eps).mul_(weight)
    return (y if scale is None else y.mul_(scale)).to(x.dtype)


def gate_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, *, exact: bool = False
) -> Tensor:
    """See shared.ops."""
    if exact or _trains(x, y, weight, gate):
        normed = rms_norm(y, weight, eps, exact=exact)
        return x + (normed if gate is None else gate * normed)
    y = _normalised(y, eps)
    return torch.addcmul(x, (y if gate is None else y.mul_(gate)).to(x.dtype), weight)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, n_heads: int, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See shared.ops."""
    split = qkv.unflatten(-1, (3, n_heads, -1))
    if exact or _trains(qkv, q_weight, k_weight):
        q, k, v = split.unbind(2)
        q = rotate(rms_norm(q, q_weight, eps, exact=exact), rope)
        k = rotate(rms_norm(k, k_weight, eps, exact=exact), rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    both = _normalised(split.narrow(2, 0, 2), eps, spend=True).mul_(torch.stack((q_weight, k_weight)).unsqueeze(1))
    torch.view_as_complex(both.unflatten(-1, (-1, 2))).mul_(torch.view_as_complex(rope).unsqueeze(2))
    q, k = both.to(qkv.dtype).transpose(1, 3).unbind(2)
    return q, k, split.select(2, 2).transpose(1, 2)


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
    return torch.view_as_real(pairs * torch.view_as_complex(rope)).flatten(-2).type_as(x)


def _normalised(x: Tensor, eps: float, *, spend: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis: float32, and the caller's to change. spend: x may be it."""
    wide = x.float()
    rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rms = rms.mul_(x.shape[-1] ** -0.5).hypot_(_root(eps))
    return torch.div(wide, rms) if wide is x and not spend else wide.div_(rms)


@cache
def _root(eps: float) -> Tensor:
    """A scalar on the CPU, which every device takes as an argument."""
    return torch.tensor(math.sqrt(eps), device="cpu")


def _trains(*tensors: Tensor | None) -> bool:
    """Whether somebody wants a gradient through these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

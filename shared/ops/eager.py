"""The four operations in plain torch: their meaning, and what runs wherever nothing better is written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_modulate(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, exact: bool = False) -> Tensor:
    """See shared.ops."""
    normed = rms_norm(x, weight, eps, exact=exact)
    return normed if scale is None else normed * scale


def gate_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, *, exact: bool = False
) -> Tensor:
    """See shared.ops."""
    normed = rms_norm(y, weight, eps, exact=exact)
    if gate is None:
        return x + normed
    return x + gate * normed if exact else torch.addcmul(x, gate, normed)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, n_heads: int, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See shared.ops."""
    q, k, v = qkv.unflatten(-1, (3, n_heads, -1)).unbind(2)
    q = rotate(rms_norm(q, q_weight, eps, exact=exact), rope)
    k = rotate(rms_norm(k, k_weight, eps, exact=exact), rope)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def swiglu(w13: Tensor) -> Tensor:
    """See shared.ops."""
    gate, value = w13.chunk(2, dim=-1)
    return F.silu(gate) * value


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, exact: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 inside; exact rounds before the weight too."""
    if exact and x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, None, eps) * weight
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i + 1]) by its angle in float32: x (B, S, H, E), rope as in shared.ops; x's type."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(rope)).flatten(-2).type_as(x)

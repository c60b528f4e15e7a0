"""Scaled dot-product attention behind one function, so that a faster backend is one more file, not one more flag."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q_BSHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v for (batch, tokens, heads, head width) tensors of one type.

    mask: bool, broadcastable to (B, H, S, S), true where a key may be seen; None sees all.
    Returns (B, S, H, E). Computed by torch's own choice of flash, memory-efficient or plain kernel.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSHE, k_BSHE, v_BSHE))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

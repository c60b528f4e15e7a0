"""Scaled dot-product attention behind one function, so that a faster backend is one more file, not one more flag."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TwoViews(NamedTuple):
    """Attention over [image, caption, negative caption] where the two captions do not see each other.

    The image looks at itself and the caption, and at itself and the negative caption; combine(first, second), of
    (B, image tokens, H, E) each, makes one result of it. The captions each look at the image and themselves.
    image, caption: tokens. mask, negative_mask: as for attend(), over image and caption, image and negative caption.
    """

    image: int
    caption: int
    mask: Tensor | None
    negative_mask: Tensor | None
    combine: Callable[[Tensor, Tensor], Tensor]


def attend(q_BHSE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | TwoViews | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v for (batch, heads, tokens, head width) tensors of one type.

    mask: bool, broadcastable to (B, H, S, S), true where a key may be seen; None sees all. TwoViews: see there.
    Returns (B, H, S, E). Computed by torch's own choice of flash, memory-efficient or plain kernel.
    """
    if isinstance(mask, TwoViews):
        return _attend_twice(q_BHSE, k_BHSE, v_BHSE, mask)
    return F.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, attn_mask=mask)


def _attend_twice(q_BHSE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, views: TwoViews) -> Tensor:
    image, joint = views.image, views.image + views.caption
    q, k, v = (x[:, :, :joint] for x in (q_BHSE, k_BHSE, v_BHSE))
    first = attend(q, k, v, views.mask)
    q, k, v = (torch.cat([x[:, :, :image], x[:, :, joint:]], dim=2) for x in (q_BHSE, k_BHSE, v_BHSE))
    second = attend(q, k, v, views.negative_mask)
    guided = views.combine(first[:, :, :image].transpose(1, 2), second[:, :, :image].transpose(1, 2)).transpose(1, 2)
    return torch.cat([guided, first[:, :, image:], second[:, :, image:]], dim=2)

"""Scaled dot-product attention behind one function, so that a faster backend is one more file, not one more flag."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.z_image import cpu_attention
from shared.ops.attention import SDPA, Backend, plain_is_wanted


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


def attend(
    q_BHSE: Tensor,
    k_BHSE: Tensor,
    v_BHSE: Tensor,
    mask: Tensor | TwoViews | None = None,
    *,
    exact: bool = False,
    backend: Backend = SDPA,
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v for (batch, heads, tokens, head width) tensors of one type.

    mask: bool, broadcastable to (B, H, S, S), true where a key may be seen; None sees all. TwoViews: see there.
    Returns (B, H, S, E). Computed by torch's own choice of flash, memory-efficient or plain kernel, as the reference
    does; unless `exact`, by cpu_attention.py where that is faster, or by `backend`, which knows no masks.
    """
    if isinstance(mask, TwoViews):
        return _attend_twice(q_BHSE, k_BHSE, v_BHSE, mask, exact, backend)
    if mask is None and not exact and not plain_is_wanted():
        if backend is not SDPA:
            return backend.run(q_BHSE, k_BHSE, v_BHSE)
        if cpu_attention.serves(q_BHSE):
            return cpu_attention.attend(q_BHSE, k_BHSE, v_BHSE)
    return F.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, attn_mask=mask)


def _attend_twice(
    q_BHSE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, views: TwoViews, exact: bool, backend: Backend
) -> Tensor:
    image, joint = views.image, views.image + views.caption
    q, k, v = (x[:, :, :joint] for x in (q_BHSE, k_BHSE, v_BHSE))
    first = attend(q, k, v, views.mask, exact=exact, backend=backend)
    q, k, v = (torch.cat([x[:, :, :image], x[:, :, joint:]], dim=2) for x in (q_BHSE, k_BHSE, v_BHSE))
    second = attend(q, k, v, views.negative_mask, exact=exact, backend=backend)
    guided = views.combine(first[:, :, :image].transpose(1, 2), second[:, :, :image].transpose(1, 2)).transpose(1, 2)
    return torch.cat([guided, first[:, :, image:], second[:, :, image:]], dim=2)

"""A block of plain weights on a CPU, from one compiled kernel straight to the next: straight.py's work, nothing asked.

What the operations of shared/ops ask at every call (whose kernels serve, how tensors lie, what the next linear takes)
is asked once here, for the block. For a network of width 128 that is a sixth of its time; a real one does not notice.
Two pieces of memory serve twice: the norm before the feed-forward is written over the one before attention, and the
stream behind the feed-forward over the one before it. The numbers are straight.py's to the bit.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.z_image.attention import TwoViews, attend
from models.z_image.modulation import Factors
from models.z_image.token_rows import CPU_TOKENS
from shared import ops
from shared.ops.eager import SHORT

if TYPE_CHECKING:
    from models.z_image.transformer import Block

_KINDS = (torch.float32, torch.bfloat16)


def serves(block: Block, x_BSD: Tensor, rope: Tensor, f: Factors) -> bool:
    """Whether forward() below stands for straight.py's, which has made sure of what it needs itself."""
    if f.attention_scale is not None or f.attention_norm1.dtype != torch.float32 or not ops.reads_sums(x_BSD):
        return False
    parts: dict[str, Any] = block._modules
    attention, feed_forward = parts["attention"]._modules, parts["feed_forward"]._modules
    return (
        type(x_BSD) is Tensor  # no stand-in of a mode that only works out shapes
        and x_BSD.is_contiguous()
        and rope.is_complex()
        and rope.is_contiguous()
        and rope.shape[1] == x_BSD.shape[1]  # loops would read past its end
        and _is_plain(attention["qkv"])
        and _is_plain(attention["out"])
        and _is_plain(feed_forward["w13"])
        and _is_plain(feed_forward["w2"])
    )


def forward(block: Block, x_BSD: Tensor, rope: Tensor, mask: Tensor | TwoViews | None, f: Factors) -> Tensor:
    """What straight.forward(block, ...) gives, to the bit."""
    kernels, over_rows, kind_of = _compiled()
    parts: dict[str, Any] = block._modules
    attention, feed_forward = parts["attention"]._modules, parts["feed_forward"]._modules
    heads, backend, eps = parts["attention"].n_heads, parts["attention"].backend, block.eps
    batch, tokens, dim = x_BSD.shape
    rows, dtype = batch * tokens, attention["qkv"]._parameters["weight"].dtype
    stream, narrow = kind_of(x_BSD), kernels.FLOAT32 if dtype == torch.float32 else kernels.BFLOAT16

    normed = torch.empty(batch, tokens, dim, dtype=dtype)
    start, into = x_BSD.data_ptr(), normed.data_ptr()
    over_rows(kernels.norm, rows, dim, start, stream, f.attention_norm1.data_ptr(), into, narrow, 0, eps)
    qkv = _product(attention["qkv"], normed)
    width, wide = dim // heads, torch.float32 if tokens < SHORT else dtype
    heads_first = torch.empty(3, batch, heads, tokens, width, dtype=wide)
    over_rows(
        kernels.qk_norm_rope, rows, heads, width, tokens, batch, qkv.data_ptr(), narrow, 0, 0, f.qk_norm.data_ptr(),
        rope.data_ptr(), len(rope), heads_first.data_ptr(), kind_of(heads_first), eps, numbers=3 * dim,
    )  # fmt: skip
    del qkv
    q_BHSE, k_BHSE, v_BHSE = heads_first.unbind()
    h_BHSE = attend(q_BHSE, k_BHSE, v_BHSE, mask, backend=backend)
    del heads_first, q_BHSE, k_BHSE, v_BHSE
    h_BSD = _product(attention["out"], h_BHSE.transpose(1, 2).flatten(2).to(dtype))

    x_BSD = torch.empty(batch, tokens, dim, dtype=x_BSD.dtype)
    kept = x_BSD.data_ptr()
    over_rows(
        kernels.gate_residual_norm, rows, dim, start, stream, h_BSD.data_ptr(), narrow, 0, 0,
        f.attention_norm2.data_ptr(), kept, f.ffn_norm1.data_ptr(), into, narrow, 0, eps,
    )  # fmt: skip
    del h_BSD, h_BHSE
    hidden = feed_forward["w2"].in_features
    flat, at_once = normed.view(rows, dim), _rows_at_once(rows)
    for first in range(0, rows, at_once):
        some = flat[first : first + at_once]
        count, here = len(some), kept + first * dim * x_BSD.itemsize
        both_BSF = _product(feed_forward["w13"], some)
        opened_BSF = torch.empty(count, hidden, dtype=dtype)
        over_rows(
            kernels.swiglu, count, hidden, both_BSF.data_ptr(), narrow, 0, 0, opened_BSF.data_ptr(), narrow, 0,
            numbers=2 * hidden,
        )  # fmt: skip
        h_BSD = _product(feed_forward["w2"], opened_BSF)
        over_rows(
            kernels.gate_residual_norm, count, dim, here, stream, h_BSD.data_ptr(), narrow, 0, 0,
            f.ffn_norm2.data_ptr(), here, 0, 0, 0, 0, eps,
        )  # fmt: skip
    return x_BSD


def _rows_at_once(rows: int) -> int:
    """Rows of the parts, of equal length, that go through the feed-forward."""
    return -(-rows // -(-rows // CPU_TOKENS))


def _product(linear: nn.Module, x: Tensor) -> Tensor:
    weight: Any = linear._parameters["weight"]
    return F.linear(x, weight)


@cache
def _compiled() -> tuple[Any, Any, Any]:
    """What needs numba, imported once: asking for a module takes microseconds, too."""
    from shared.ops import compiled, compiled_kernels

    return compiled_kernels, compiled.over_rows, compiled.kind_of


def _is_plain(linear: nn.Module) -> bool:
    """An nn.Linear that nothing hangs on, with a weight that kernels read and no bias."""
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
        return False
    own: dict[str, Any] = linear._parameters
    return own["weight"].dtype in _KINDS and own["bias"] is None and "forward" not in linear.__dict__

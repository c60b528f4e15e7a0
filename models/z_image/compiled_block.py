"""A block of plain weights on a CPU, from one compiled kernel straight to the next: straight.py's work, nothing asked.

What the operations of shared/ops ask at every call (whose kernels serve, how tensors lie, what the next linear takes)
is asked once here, for the block. For a network of width 128 that is a sixth of its time; a real one does not notice.
Its weights are multiplied as laid_out.py keeps them. Two pieces of memory serve again: what goes into a product is
written over what went into the one before, and the stream behind the feed-forward over the one before it. The numbers
are straight.py's to the bit.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.z_image.attention import TwoViews, attend
from models.z_image.laid_out import product, weights_of
from models.z_image.modulation import Factors
from models.z_image.token_rows import CPU_TOKENS
from shared import ops
from shared.ops.eager import SHORT

if TYPE_CHECKING:
    from models.z_image.block import Block

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
    linears = attention["qkv"], attention["out"], feed_forward["w13"], feed_forward["w2"]
    own = tuple([linear._parameters["weight"] for linear in linears])
    heads, backend, eps = parts["attention"].n_heads, parts["attention"].backend, block.eps
    batch, tokens, dim = x_BSD.shape
    rows, dtype, hidden = batch * tokens, own[0].dtype, linears[3].in_features
    qkv_weight, out_weight, w13_weight, w2_weight = weights_of(block, own, rows)
    stream, narrow = kind_of(x_BSD), kernels.FLOAT32 if dtype == torch.float32 else kernels.BFLOAT16

    normed = torch.empty(rows, dim, dtype=dtype)
    start, into = x_BSD.data_ptr(), normed.data_ptr()
    over_rows(kernels.norm, rows, dim, start, stream, f.attention_norm1.data_ptr(), into, narrow, 0, eps)
    qkv = product(normed, qkv_weight)
    q_BHSE, k_BHSE, v_BHSE = _heads(f, qkv, rope, (batch, tokens, heads, dim // heads), eps)
    del qkv
    h_BSHE = attend(q_BHSE, k_BHSE, v_BHSE, mask, backend=backend).transpose(1, 2)
    wide = q_BHSE.dtype
    del q_BHSE, k_BHSE, v_BHSE
    if wide != dtype and h_BSHE.is_contiguous():  # in the place of what is multiplied already
        over_rows(kernels.convert, rows, dim, h_BSHE.data_ptr(), kernels.FLOAT32, 0, 0, into, narrow, 0)
        h_SD = product(normed, out_weight)
    else:
        h_SD = product(h_BSHE.reshape(rows, dim).to(dtype), out_weight)

    x_BSD = torch.empty(batch, tokens, dim, dtype=x_BSD.dtype)
    kept = x_BSD.data_ptr()
    over_rows(
        kernels.gate_residual_norm, rows, dim, start, stream, h_SD.data_ptr(), narrow, 0, 0,
        f.attention_norm2.data_ptr(), kept, f.ffn_norm1.data_ptr(), into, narrow, 0, eps,
    )  # fmt: skip
    del h_SD, h_BSHE
    at_once = _rows_at_once(rows)
    for first in range(0, rows, at_once):
        some = normed if at_once == rows else normed[first : first + at_once]
        count, here = min(at_once, rows - first), kept + first * dim * x_BSD.itemsize
        both_SF = product(some, w13_weight)
        opened_SF = torch.empty(count, hidden, dtype=dtype)
        over_rows(
            kernels.swiglu, count, hidden, both_SF.data_ptr(), narrow, 0, 0, opened_SF.data_ptr(), narrow, 0,
            numbers=2 * hidden,
        )  # fmt: skip
        h_SD = product(opened_SF, w2_weight)
        over_rows(
            kernels.gate_residual_norm, count, dim, here, stream, h_SD.data_ptr(), narrow, 0, 0,
            f.ffn_norm2.data_ptr(), here, 0, 0, 0, 0, eps,
        )  # fmt: skip
    return x_BSD


def _heads(
    f: Factors, qkv_SF: Tensor, rope: Tensor, shape: tuple[int, int, int, int], eps: float
) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, H, S, E) as ops.qk_norm_rope() gives them. shape: B, S, H, E."""
    kernels, over_rows, kind_of = _compiled()
    batch, tokens, heads, width = shape
    is_short = tokens < SHORT
    if is_short:
        out = torch.empty(3, batch, tokens, heads, width)
    else:
        out = torch.empty(3, batch, heads, tokens, width, dtype=qkv_SF.dtype)
    over_rows(
        kernels.qk_norm_rope, batch * tokens, heads, width, tokens, batch, qkv_SF.data_ptr(), kind_of(qkv_SF), 0, 0,
        f.qk_norm.data_ptr(), rope.data_ptr(), len(rope), out.data_ptr(), kind_of(out), is_short, eps,
        numbers=3 * heads * width,
    )  # fmt: skip
    return (out.transpose(2, 3) if is_short else out).unbind()


def _rows_at_once(rows: int) -> int:
    """Rows of the parts, of equal length, that go through the feed-forward."""
    return -(-rows // -(-rows // CPU_TOKENS))


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

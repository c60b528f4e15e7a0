"""A block without detours, for small networks on CPUs: block.Block's operations, in its order, on its numbers.

Calling a module and asking it for a part cost Python microseconds each: nothing beside a real block's second, a third
of the time of a block of width 128. Here parts are taken from where modules keep them, and a linear that nothing hangs
on is multiplied by its weight. Everything else (packed weights, LoRA's hooks, what an offloader puts in the place of
forward()) is called as usual; a block whose attention or feed-forward is hooked goes the usual way altogether.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.z_image import compiled_block
from models.z_image.attention import TwoViews, attend
from models.z_image.modulation import Factors
from models.z_image.token_rows import in_parts
from shared import ops
from shared.ops import Rounded, Sums
from shared.quant.linear import JoinedLinear, PackedLinear

_CPU = torch.device("cpu")

if TYPE_CHECKING:
    from models.z_image.block import Attention, Block, FeedForward


def serves(block: Block, x_BSD: Tensor, f: Factors) -> bool:
    """Whether forward() below stands for the block's own."""
    parts: dict[str, Any] = block._modules
    return (
        x_BSD.is_cpu
        and x_BSD.dtype != torch.float16
        and not f.exact
        and not torch.is_grad_enabled()
        and _is_bare(parts["attention"])
        and _is_bare(parts["feed_forward"])
    )


def forward(block: Block, x_BSD: Tensor, rope: Tensor, mask: Tensor | TwoViews | None, f: Factors) -> Tensor:
    """What block(x_BSD, ...) gives, to the bit; with int8 weights rounded to bfloat16 four times less."""
    if compiled_block.serves(block, x_BSD, rope, f):
        return compiled_block.forward(block, x_BSD, rope, mask, f)
    parts: dict[str, Any] = block._modules
    attention, feed_forward = parts["attention"], parts["feed_forward"]
    qkv, w13, eps = attention._modules["qkv"], feed_forward._modules["w13"], block.eps
    normed = ops.rms_norm_modulate_into(qkv, x_BSD, f.attention_norm1, f.attention_scale, eps)
    h_BSD = _attended(attention, normed, rope, mask, f)
    del normed  # here and below: at many tokens its memory is wanted
    x_BSD, normed = ops.gate_residual_norm_into(
        w13, x_BSD, h_BSD, f.attention_gate, f.attention_norm2, f.ffn_norm1, f.ffn_scale, eps
    )
    del h_BSD
    h_BSD = in_parts(partial(_fed, feed_forward), normed, is_expanded=_is_expanded(w13))
    del normed
    return ops.gate_residual(x_BSD, h_BSD, f.ffn_gate, f.ffn_norm2, eps)


def _attended(
    attention: Attention, x_BSD: Tensor | Rounded, rope: Tensor, mask: Tensor | TwoViews | None, f: Factors
) -> Tensor | Sums:
    parts: dict[str, Any] = attention._modules
    q_BHSE, k_BHSE, v_BHSE = ops.qk_norm_rope(
        product(parts["qkv"], x_BSD), f.qk_norm, rope, attention.n_heads, attention.eps
    )
    h_BHSE = attend(q_BHSE, k_BHSE, v_BHSE, mask, backend=attention.backend)
    del q_BHSE, k_BHSE, v_BHSE
    return product(parts["out"], h_BHSE.transpose(1, 2).flatten(2).to(x_BSD.dtype))


def _fed(feed_forward: FeedForward, x_BSD: Tensor | Rounded) -> Tensor | Sums:
    parts: dict[str, Any] = feed_forward._modules
    w2 = parts["w2"]
    return product(w2, ops.swiglu_into(w2, product(parts["w13"], x_BSD)))


def product(linear: nn.Module, x: Tensor | Rounded) -> Tensor | Sums:
    """linear(x); of int8 weights the sums as they come, where the operation that follows scales them."""
    if not _is_bare(linear):
        answer: Tensor = linear(x)
        return answer
    if type(linear) is nn.Linear:
        own: dict[str, Any] = linear._parameters
        return F.linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
    if type(linear) in (PackedLinear, JoinedLinear) and ops.reads_sums(x):
        packed: Any = linear
        return packed.unscaled(x)  # type: ignore[no-any-return]
    answer = linear(x)
    return answer


def _is_expanded(linear: nn.Module) -> bool:
    """Whether every call unpacks the weight, so that few calls are better."""
    return isinstance(linear, PackedLinear) and linear.kernel(_CPU).expands


def _is_bare(module: nn.Module) -> bool:
    """Whether calling it means its class's forward() and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)

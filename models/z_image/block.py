"""One block of the S3-DiT: attention and a gated feed-forward, each between two norms. Shape legend: transformer.py.

    x += gate_a * norm(attention(scale_a * norm(x)))
    x += gate_f * norm(feed_forward(scale_f * norm(x)))

Scales and gates come from the time (modulation.py) and are the same for all tokens. Every line is a matrix product and
one pass of shared/ops around it: the gated sum that ends attention and the norm that begins the feed-forward are one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.z_image import straight
from models.z_image.attention import TwoViews, attend
from models.z_image.config import TransformerConfig
from models.z_image.modulation import Factors, Moment, block_factors
from models.z_image.token_rows import in_parts
from shared import ops
from shared.ops import Rounded
from shared.ops.attention import SDPA

# Where bfloat16 is slow (NVIDIA before Ampere), the network computes in float16, whose largest number is 65504. The
# feed-forward's inner products go beyond it; a norm follows, which takes any share of them for the whole.
NARROW_SHARE = 2.0**-6
_NARROW_LIMIT = torch.finfo(torch.float16).max


class Block(nn.Module):
    """Attention and gated feed-forward, each normalised before and after; the time steers scales and gates."""

    def __init__(self, config: TransformerConfig, *, modulated: bool = True) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.eps = eps
        self.attention = Attention(config)
        self.feed_forward = FeedForward(dim, config.ffn_dim)
        self.attention_norm1 = nn.RMSNorm(dim, eps=eps)
        self.attention_norm2 = nn.RMSNorm(dim, eps=eps)
        self.ffn_norm1 = nn.RMSNorm(dim, eps=eps)
        self.ffn_norm2 = nn.RMSNorm(dim, eps=eps)
        if modulated:
            # A Sequential of one, because every checkpoint calls it adaLN_modulation.0
            self.adaLN_modulation = nn.Sequential(nn.Linear(config.time_dim, 4 * dim))

    def forward(
        self,
        x_BSD: Tensor,
        rope: Tensor,
        mask: Tensor | TwoViews | None,
        moment: Moment | None,
        *,
        exact: bool = False,
    ) -> Tensor:
        """One block over (B, S, D). `moment` is None for the context refiner, which has no modulation; `exact` is
        for it alone, a moment has its own."""
        f: Factors = self.factors(None, exact=exact, apart=False)[0] if moment is None else moment.of(self)
        if straight.serves(self, x_BSD, f):
            return straight.forward(self, x_BSD, rope, mask, f)
        eps = self.eps
        is_narrow = x_BSD.dtype == torch.float16
        qkv, w13 = self.attention.qkv, self.feed_forward.w13
        normed = ops.rms_norm_modulate_into(qkv, x_BSD, f.attention_norm1, f.attention_scale, eps, exact=f.exact)
        h_BSD = self.attention(normed, rope, mask, f)
        if not is_narrow:
            x_BSD, normed = ops.gate_residual_norm_into(
                w13, x_BSD, h_BSD, f.attention_gate, f.attention_norm2, f.ffn_norm1, f.ffn_scale, eps, exact=f.exact
            )
            h_BSD = self.feed_forward(normed, whole=f.exact)
            return ops.gate_residual(x_BSD, h_BSD, f.ffn_gate, f.ffn_norm2, eps, exact=f.exact)
        x_BSD = ops.gate_residual(x_BSD, bounded(h_BSD), f.attention_gate, f.attention_norm2, eps, exact=f.exact)
        x_BSD = bounded(x_BSD)
        normed = ops.rms_norm_modulate_into(w13, x_BSD, f.ffn_norm1, f.ffn_scale, eps, exact=f.exact)
        h_BSD = self.feed_forward(normed, whole=f.exact)
        eps *= NARROW_SHARE**2  # the norm of a share is that of the whole, if its eps is one as well
        return bounded(ops.gate_residual(x_BSD, bounded(h_BSD), f.ffn_gate, f.ffn_norm2, eps, exact=f.exact))

    def factors(self, time_RT: Tensor | None, *, exact: bool, apart: bool) -> list[Factors]:
        """See modulation.Timed."""
        return block_factors(self, time_RT, exact=exact, apart=apart)


class Attention(nn.Module):
    """Full self-attention with RMS-normalised, rotated queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.n_heads, self.eps = config.n_heads, config.norm_eps
        self.backend = SDPA
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x_BSD: Tensor, rope: Tensor, mask: Tensor | TwoViews | None, f: Factors) -> Tensor:
        q_BHSE, k_BHSE, v_BHSE = ops.qk_norm_rope(
            self.qkv(x_BSD), f.qk_norm, rope, self.n_heads, self.eps, exact=f.exact
        )
        h_BHSE = attend(q_BHSE, k_BHSE, v_BHSE, mask, exact=f.exact, backend=self.backend)
        return self.out(h_BHSE.transpose(1, 2).flatten(2).to(x_BSD.dtype))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), w1 and w3 stacked into one linear, w1's rows first.

    In float16 the result is NARROW_SHARE of that.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BSD: Tensor | Rounded, *, whole: bool = False) -> Tensor:
        """(B, S, D). whole: all tokens in one product, as the reference makes it."""
        if whole or torch.is_grad_enabled():
            return self._fed(x_BSD)
        fed: Tensor = in_parts(self._fed, x_BSD)  # type: ignore[assignment]  # of tensors
        return fed

    def _fed(self, x_BSD: Tensor | Rounded) -> Tensor:
        both_BSF = self.w13(x_BSD)
        if both_BSF.dtype == torch.float16:
            gate, value = both_BSF.chunk(2, dim=-1)
            both_BSF = torch.cat([gate, value * NARROW_SHARE], dim=-1)
        # Who is asked here is not told whether bits count; straight.py asks otherwise.
        return self.w2(ops.swiglu_into(self.w2, both_BSF, exact=True))


def bounded(x: Tensor) -> Tensor:
    """float16 with the largest number in the place of infinity, from which the next norm would make NaN."""
    return x.clamp(-_NARROW_LIMIT, _NARROW_LIMIT)

"""Qwen3 as the text encoder needs it: tokens to hidden states in one pass, without cache, head or final norm.

Shape legend:  B prompts  N tokens  C width  H query heads  G heads of keys and values  E numbers in a head

    x = embed_tokens(ids)
    each layer:  x += o_proj(attention(q_norm(q), k_norm(k), v));  x += down_proj(SiLU(gate_proj(x)) * up_proj(x))

Both halves begin with an RMSNorm. Query head h looks at key head h / (H/G); a token sees itself and those before it.
Modules are called as in transformers' files, and numbers are rounded at the same places as there.
Sources: Yang et al. 2025, arXiv 2505.09388; transformers 5.23.0 models/qwen3/modeling_qwen3.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Qwen3 constants that no tensor shows: Qwen/Qwen3-4B config.json.
ROPE_THETA = 1_000_000.0
NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Config:
    """Sizes, called as in transformers' config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


class Encoded(NamedTuple):
    """last_hidden_state: (B, N, C), after the last of the layers that there are."""

    last_hidden_state: Tensor


class Rotation(NamedTuple):
    """What turns queries and keys by their place: (N, E) each."""

    cos: Tensor
    sin: Tensor


class Qwen3(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids: Tensor) -> Encoded:
        """input_ids: (B, N). Shorter prompts may be filled up on the right: no token sees what comes after it."""
        x = self.embed_tokens(input_ids)
        rope = rotation(input_ids.shape[1], self.config.head_dim, x)
        for layer in self.layers:
            x = layer(x, rope)
        return Encoded(x)


class Layer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = FeedForward(config)

    def forward(self, x_BNC: Tensor, rope: Rotation) -> Tensor:
        x_BNC = x_BNC + self.self_attn(self.input_layernorm(x_BNC), rope)
        out: Tensor = x_BNC + self.mlp(self.post_attention_layernorm(x_BNC))
        return out


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def forward(self, x_BNC: Tensor, rope: Rotation) -> Tensor:
        q_BHNE = rotate(self.q_norm(self._heads(self.q_proj(x_BNC))), rope)
        k_BGNE = rotate(self.k_norm(self._heads(self.k_proj(x_BNC))), rope)
        v_BGNE = self._heads(self.v_proj(x_BNC))
        each = q_BHNE.shape[1] // k_BGNE.shape[1]
        k_BHNE, v_BHNE = (t.repeat_interleave(each, dim=1) for t in (k_BGNE, v_BGNE))
        mixed_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE, is_causal=True)
        out: Tensor = self.o_proj(mixed_BHNE.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x_BNC: Tensor) -> Tensor:
        """(B, N, heads * E) -> (B, heads, N, E)."""
        return x_BNC.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BNC: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_BNC)) * self.up_proj(x_BNC))
        return out


class RMSNorm(nn.Module):
    """x over its root mean square in float32, rounded to x's type, times the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
        return self.weight * wide.to(x.dtype)


def rotation(length: int, head_dim: int, like: Tensor) -> Rotation:
    """For the places 0 to length - 1: number i of a head's first half turns with number i of its second.

    By place * theta^(-2i / E), computed in float32, given in the type and on the device of `like`.
    """
    speeds = ROPE_THETA ** -(torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * speeds
    both = torch.cat([angles, angles], dim=-1)
    return Rotation(both.cos().to(like.dtype), both.sin().to(like.dtype))


def rotate(x_BHNE: Tensor, rope: Rotation) -> Tensor:
    """Each head's two halves as the two axes of a plane, turned by the angle of the place."""
    first, second = x_BHNE.chunk(2, dim=-1)
    return x_BHNE * rope.cos + torch.cat([-second, first], dim=-1) * rope.sin

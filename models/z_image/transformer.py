"""S3-DiT, the Z-Image transformer: one stream of image and caption tokens, read top to bottom.

    latents (B,16,H,W) --patchify--> x_embedder --noise_refiner (sees the time)----+
                                                                                   +--> [image, caption] --layers-->
    caption features  --cap_embedder--> context_refiner (does not see the time) ---+
                                                       --final_layer on the image tokens--> unpatchify

Shape legend:  B batch   N image tokens, padded   L caption tokens, padded   S = N + L   D model width
               H heads   E head width (D / H)   T time-embedding width

What is unusual, and easily got wrong (sources: Tongyi-MAI/Z-Image src/zimage/transformer.py, diffusers 0.42.1):
* Time runs backwards: `t = 1 - sigma`, 0 is pure noise. The network returns x0 - noise; the pipeline negates it.
* Both streams are padded to a multiple of 32 with *learned* tokens that are attended like any other. Only what is
  added to even out different captions of one batch is masked.
* RoPE has three axes (sequence, row, column). Caption token i sits at (1 + i, 0, 0), through its padding; the image at
  (L + 1, row, column); image padding at (0, 0, 0). Pairs are interleaved, angles and rotation are float32.
* Image tokens come first in the joint sequence. A patch lists row, column, channel, the channel running fastest.
* The four adaLN vectors are scale, gate, scale, gate (attention, then feed-forward), used as 1 + scale and tanh(gate);
  there is no shift. A SiLU stands before the final layer's modulation and before no other.

Linears are fused as far as every file format allows: `attention.qkv` holds the rows of q, k, v, `feed_forward.w13`
those of w1 (the gate) and w3. One read of the activations, one product. keys.py maps every file's names to these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.z_image.attention import TwoViews, attend
from models.z_image.config import SEQUENCE_MULTIPLE, TransformerConfig
from models.z_image.lora import fuse

if TYPE_CHECKING:
    from models.z_image.control import ControlBranch, ControlSignal
    from models.z_image.guidance import NormalizedAttentionGuidance


class Captions(NamedTuple):
    """The captions of a batch after the context refiner: the same at every step, so computed once."""

    tokens_BLD: Tensor
    lengths: tuple[int, ...]  # tokens of each caption with its learned padding; the longest is L

    def repeat(self, count: int) -> Captions:
        """The same captions for `count` times as many images, each caption's images side by side."""
        lengths = tuple(n for n in self.lengths for _ in range(count))
        return Captions(self.tokens_BLD.repeat_interleave(count, dim=0), lengths)

    def followed_by(self, other: Captions) -> Captions:
        """Both in one batch, the other's behind these."""
        longest = max(self.lengths + other.lengths)
        tokens = [F.pad(c.tokens_BLD, (0, 0, 0, longest - c.tokens_BLD.shape[1])) for c in (self, other)]
        return Captions(torch.cat(tokens), self.lengths + other.lengths)


class Nag(NamedTuple):
    """Normalized attention guidance of one forward: how, and a negative caption for each image."""

    guidance: NormalizedAttentionGuidance
    negative: Captions


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, float32, (B or 1, tokens, 1, E / 2)."""

    cos: Tensor
    sin: Tensor


class ZImageTransformer(nn.Module):
    """The whole network. `config` gives the sizes; weights come from loader.py."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, blocks = config.dim, config.n_refiner_layers
        self.x_embedder = nn.Linear(config.patch_dim, dim)
        self.x_pad_token = nn.Parameter(torch.empty(1, dim))
        self.t_embedder = TimestepEmbedder(config.time_dim, config.time_hidden_dim)
        if config.has_second_time:
            self.t_embedder_2 = TimestepEmbedder(config.time_dim, config.time_hidden_dim)
        self.cap_embedder = nn.Sequential(
            nn.RMSNorm(config.cap_feat_dim, eps=config.norm_eps), nn.Linear(config.cap_feat_dim, dim)
        )
        self.cap_pad_token = nn.Parameter(torch.empty(1, dim))
        self.noise_refiner = nn.ModuleList(Block(config) for _ in range(blocks))
        self.context_refiner = nn.ModuleList(Block(config, modulated=False) for _ in range(blocks))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config)
        self.rope = RotaryAxes(config)
        # A part of the network, so that an offloader brings it along; loader.py puts it in when a file holds one.
        self.control: ControlBranch | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in: the type of the pad tokens, which no format ever packs."""
        return self.x_pad_token.dtype

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        captions: Captions | Sequence[Tensor],
        control: ControlSignal | None = None,
        *,
        target: Tensor | None = None,
        nag: Nag | None = None,
    ) -> Tensor:
        """Predict x0 - noise.

        latents: (B, 16, h, w), any float type, h and w even latent cells (picture pixels / 8).
        t: (B,) float32 model time in [0, 1], 1 - sigma. captions: what encode_captions() returned, or its input.
        control: steers through the control branch, which must be there.
        target: (B,) the time the answer is for, of TwinFlow's weights. nag: guidance inside the layers' attention.
        Returns (B, 16, h, w) float32. Raises ValueError for odd sizes or a caption count other than B.
        """
        if not isinstance(captions, Captions):
            captions = self.encode_captions(captions)
        batch, _, height, width = latents.shape
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"latents of {width}x{height} cells do not divide into {patch}x{patch} patches")
        if len(captions.lengths) != batch:
            raise ValueError(f"{len(captions.lengths)} captions for {batch} latents")

        rows, columns = height // patch, width // patch
        count = rows * columns
        image_rope, joint_rope = self.rope.for_image(captions.lengths, rows, columns, latents.device)
        mask = _length_mask(captions.lengths, image_rope.cos.shape[1], latents.device)
        time_BT = self._embed_time(t, target)

        x_BND = self.x_embedder(patchify(latents.to(self.dtype), patch))
        x_BND = pad_tokens(x_BND, image_rope.cos.shape[1], self.x_pad_token)
        follower = None
        if control is not None:
            if self.control is None:
                raise ValueError("a control signal for a transformer without a control branch")
            follower = self.control.follow(control, x_BND, image_rope, time_BT, self.x_pad_token)
        for i, block in enumerate(self.noise_refiner):
            x_BND = block(x_BND, image_rope, None, time_BT)
            if follower is not None:
                x_BND = follower.after_refiner(i, x_BND)

        x_BSD = torch.cat([x_BND, captions.tokens_BLD], dim=1)
        if follower is not None:
            follower.join(x_BSD, captions.tokens_BLD, joint_rope, mask)
        joint, rope = x_BSD.shape[1], joint_rope
        view: Tensor | TwoViews | None = mask
        if nag is not None:
            x_BSD = torch.cat([x_BSD, nag.negative.tokens_BLD], dim=1)
            rope = self.rope.with_negative(joint_rope, captions.lengths, nag.negative.lengths)
            view = _two_views(x_BND.shape[1], captions, nag, mask)
        for i, block in enumerate(self.layers):
            x_BSD = block(x_BSD, rope, view, time_BT)
            if follower is not None:  # whose hints are for the image and its caption
                x_BSD = torch.cat([follower.after_layer(i, x_BSD[:, :joint]), x_BSD[:, joint:]], dim=1)

        patches = self.final_layer(x_BSD[:, :count], time_BT)
        return unpatchify(patches.float(), rows, columns, patch)

    def encode_captions(self, features: Sequence[Tensor]) -> Captions:
        """Embed and refine caption features: (tokens, cap_feat_dim) each, of any length from 1 on."""
        lengths = tuple(_round_up(len(f)) for f in features)
        longest = max(lengths)
        tokens = [
            pad_tokens(self.cap_embedder(f.to(self.dtype))[None], n, self.cap_pad_token)
            for f, n in zip(features, lengths, strict=True)
        ]
        x_BLD = torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in tokens])
        rope = self.rope.for_caption(longest, x_BLD.device)
        mask = _length_mask(lengths, 0, x_BLD.device)
        for block in self.context_refiner:
            x_BLD = block(x_BLD, rope, mask, None)
        return Captions(x_BLD, lengths)

    def _embed_time(self, t: Tensor, target: Tensor | None) -> Tensor:
        """(B, T). TwinFlow's weights add the way to the target: its length times an embedding of it.

        Both times may have a sign. Files that lost the second embedding get along with the first, from which it was
        trained. Source: inclusionAI/TwinFlow diffusers_patch/z_image/transformer_z_image.py.
        """
        scale = self.config.t_scale
        if target is None:
            return self.t_embedder(t * scale, self.dtype)
        second = self.t_embedder_2 if self.config.has_second_time else self.t_embedder
        way = second((target - t) * scale, self.dtype) * (t - target).abs()[:, None].to(self.dtype)
        return self.t_embedder(t.abs() * scale, self.dtype) + way

    def preprocess_loras(self, _model_type: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called by a Wan2GP host before mmgp loads a LoRA: rename and stack it for the fused linears."""
        return fuse(self, state)


class Block(nn.Module):
    """Attention and gated feed-forward, each normalised before and after; the time steers scales and gates."""

    def __init__(self, config: TransformerConfig, *, modulated: bool = True) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.attention = Attention(config)
        self.feed_forward = FeedForward(dim, config.ffn_dim)
        self.attention_norm1 = nn.RMSNorm(dim, eps=eps)
        self.attention_norm2 = nn.RMSNorm(dim, eps=eps)
        self.ffn_norm1 = nn.RMSNorm(dim, eps=eps)
        self.ffn_norm2 = nn.RMSNorm(dim, eps=eps)
        if modulated:
            # A Sequential of one, because every checkpoint calls it adaLN_modulation.0
            self.adaLN_modulation = nn.Sequential(nn.Linear(config.time_dim, 4 * dim))

    def forward(self, x_BSD: Tensor, rope: Rotation, mask: Tensor | TwoViews | None, time_BT: Tensor | None) -> Tensor:
        """One block over (B, S, D). `time_BT` is None for the context refiner, which has no modulation."""
        if time_BT is None:
            x_BSD = x_BSD + self.attention_norm2(self.attention(self.attention_norm1(x_BSD), rope, mask))
            return x_BSD + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x_BSD)))
        scale_a, gate_a, scale_f, gate_f = self.adaLN_modulation(time_BT)[:, None].chunk(4, dim=-1)
        attended = self.attention(self.attention_norm1(x_BSD) * (1 + scale_a), rope, mask)
        x_BSD = x_BSD + gate_a.tanh() * self.attention_norm2(attended)
        fed = self.feed_forward(self.ffn_norm1(x_BSD) * (1 + scale_f))
        return x_BSD + gate_f.tanh() * self.ffn_norm2(fed)


class Attention(nn.Module):
    """Full self-attention with RMS-normalised, rotated queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x_BSD: Tensor, rope: Rotation, mask: Tensor | TwoViews | None) -> Tensor:
        q_BSHE, k_BSHE, v_BSHE = self.qkv(x_BSD).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        q_BSHE = rotate(self.q_norm(q_BSHE), rope)
        k_BSHE = rotate(self.k_norm(k_BSHE), rope)
        return self.out(attend(q_BSHE, k_BSHE, v_BSHE, mask).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), w1 and w3 stacked into one linear, w1's rows first."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate, value = self.w13(x_BSD).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * value)


class FinalLayer(nn.Module):
    """LayerNorm without weights, scaled by the time, then down to patches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, config.dim))

    def forward(self, x_BND: Tensor, time_BT: Tensor) -> Tensor:
        scale = 1 + self.adaLN_modulation(time_BT)[:, None]
        return self.linear(F.layer_norm(x_BND, x_BND.shape[-1:], eps=1e-6) * scale)


class TimestepEmbedder(nn.Module):
    """Cosines and sines of the scaled time at 128 frequencies from 1 down to 1/10000, through a small MLP."""

    frequencies = 256

    # Tells mmgp to leave the float32 argument alone: rounded to bfloat16, time 142.857 would become 143.
    _lock_dtype = None

    def __init__(self, out_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, out_dim))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t: (B,) float32, scaled by 1000. Returns (B, T) in `dtype`."""
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t.float()[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


class RotaryAxes(nn.Module):
    """Rotary angles of (sequence, row, column) positions; no weights, tables grow from the sizes at hand."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.axes_dims, self.axes_lens, self.theta = config.axes_dims, config.axes_lens, config.rope_theta
        self._last: tuple[object, tuple[Rotation, Rotation]] | None = None
        self._last_negative: tuple[object, Rotation] | None = None

    def for_caption(self, length: int, device: torch.device) -> Rotation:
        """Positions (1 + i, 0, 0) of the longest caption; shorter ones use its beginning."""
        return self._rotation(_caption_positions(length), device)

    def for_image(
        self, lengths: Sequence[int], rows: int, columns: int, device: torch.device
    ) -> tuple[Rotation, Rotation]:
        """Rotations of the padded image tokens, and of image and caption tokens together.

        lengths: padded caption lengths; the image sits one step behind its own caption, so images of captions of
        different length have different positions. One row serves all images when all lengths are equal.
        The tables of the last call are kept: they are the same at every step.
        """
        distinct = tuple(lengths[:1] if len(set(lengths)) == 1 else lengths)
        key = (distinct, rows, columns, device)
        if self._last is None or self._last[0] != key:
            image = _image_positions(distinct, rows, columns)
            caption = _caption_positions(max(distinct)).expand(len(distinct), -1, -1)
            joint = self._rotation(torch.cat([image, caption], dim=1), device)
            count = image.shape[1]
            self._last = key, (Rotation(joint.cos[:, :count], joint.sin[:, :count]), joint)
        return self._last[1]

    def with_negative(self, joint: Rotation, lengths: Sequence[int], negative: Sequence[int]) -> Rotation:
        """`joint` (from for_image) followed by the negative captions, each as far before the image as if alone with it.

        lengths, negative: padded lengths of each image's caption and negative caption. Attention sees differences of
        positions only, so a negative caption of another length need not be cut or filled up.
        """
        pairs = list(zip(lengths, negative, strict=True))
        pairs = pairs[:1] if len(set(pairs)) == 1 else pairs
        key = (tuple(pairs), joint.cos.shape, joint.cos.device)
        if self._last_negative is None or self._last_negative[0] != key:
            positions = _caption_positions(max(negative)).repeat(len(pairs), 1, 1)
            positions[:, :, 0] += torch.tensor([[mine - other] for mine, other in pairs], device="cpu")
            tail = self._rotation(positions, joint.cos.device)
            rows = max(len(pairs), len(joint.cos))
            wide = [tuple(x.expand(rows, -1, -1, -1) for x in table) for table in (joint, tail)]
            self._last_negative = key, Rotation(*(torch.cat(halves, dim=1) for halves in zip(*wide, strict=True)))
        return self._last_negative[1]

    def _rotation(self, positions: Tensor, device: torch.device) -> Rotation:
        """positions: (B, tokens, 3) integers. Angles in float64, rounded once to float32, as the reference does.

        Worked out on the CPU: some accelerators have no float64, and every device then gets the same numbers.
        """
        angles = []
        for axis, width in enumerate(self.axes_dims):
            exponents = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
            angles.append(positions[..., axis, None].double() / self.theta**exponents)
        table = torch.cat(angles, dim=-1).float()[:, :, None]
        return Rotation(table.cos().to(device), table.sin().to(device))


def _two_views(image: int, captions: Captions, nag: Nag, mask: Tensor | None) -> TwoViews:
    negative = nag.negative
    negative_mask = _length_mask(negative.lengths, image, negative.tokens_BLD.device)
    return TwoViews(image, captions.tokens_BLD.shape[1], mask, negative_mask, nag.guidance.combine)


def _caption_positions(length: int) -> Tensor:
    positions = torch.zeros(1, length, 3, dtype=torch.int64, device="cpu")
    positions[0, :, 0] = torch.arange(1, length + 1, device="cpu")
    return positions


def _image_positions(lengths: Sequence[int], rows: int, columns: int) -> Tensor:
    """(len(lengths), padded image tokens, 3): one step behind the caption, then row and column; padding at 0."""
    grid = torch.cartesian_prod(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"))
    positions = torch.zeros(len(lengths), _round_up(len(grid)), 3, dtype=torch.int64, device="cpu")
    positions[:, : len(grid), 0] = torch.tensor(lengths, device="cpu")[:, None] + 1
    positions[:, : len(grid), 1:] = grid
    return positions


def rotate(x_BSHE: Tensor, rope: Rotation) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) by its angle, in float32; returns x's type."""
    even, odd = x_BSHE.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = (even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos)
    return torch.stack(turned, dim=-1).flatten(-2).type_as(x_BSHE)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) -> (B, h/p * w/p, p*p*C), a patch listing row, column, channel."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """(B, rows * columns, p*p*C) -> (B, C, rows * p, columns * p), the inverse of patchify()."""
    batch, _, width = patches.shape
    channels = width // (patch * patch)
    x = patches.reshape(batch, rows, columns, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch, columns * patch)


def _round_up(count: int) -> int:
    return -(-count // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE


def pad_tokens(x_BND: Tensor, length: int, pad_token: Tensor) -> Tensor:
    """The tokens (B, N, D) with copies of the learned pad token (1, D) behind them, `length` in all."""
    missing = length - x_BND.shape[1]
    if not missing:
        return x_BND
    return torch.cat([x_BND, pad_token.to(x_BND.dtype).expand(x_BND.shape[0], missing, -1)], dim=1)


def _length_mask(lengths: Sequence[int], before: int, device: torch.device) -> Tensor | None:
    """(B, 1, 1, before + L) bool, true where a key is real; None when all captions are equally long."""
    if len(set(lengths)) == 1:
        return None
    ends = torch.tensor(lengths, device=device)[:, None] + before
    return (torch.arange(before + max(lengths), device=device) < ends)[:, None, None]

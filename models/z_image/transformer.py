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

from models.z_image.attention import TwoViews
from models.z_image.block import Attention, Block
from models.z_image.config import TransformerConfig
from models.z_image.lora import fuse
from models.z_image.modulation import Moment, Timetable
from models.z_image.patches import pad_tokens, patchify, round_up, unpatchify
from models.z_image.rope import RotaryAxes, as_read, length_mask
from shared import ops
from shared.ops.attention import Backend
from shared.quant.number_checks import NumberChecks

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
            CaptionNorm(config.cap_feat_dim, eps=config.norm_eps), nn.Linear(config.cap_feat_dim, dim)
        )
        self.cap_pad_token = nn.Parameter(torch.empty(1, dim))
        self.noise_refiner = nn.ModuleList(Block(config) for _ in range(blocks))
        self.context_refiner = nn.ModuleList(Block(config, modulated=False) for _ in range(blocks))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config)
        self.rope = RotaryAxes(config)
        # A part of the network, so that an offloader brings it along; loader.py puts it in when a file holds one.
        self.control: ControlBranch | None = None
        self.number_checks = NumberChecks()  # what load_transformer() has left to do of them

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in: the type of the pad tokens, which no format ever packs."""
        return self.x_pad_token.dtype

    def forward(
        self,
        latents: Tensor,
        t: Tensor | Moment,
        captions: Captions | Sequence[Tensor],
        control: ControlSignal | None = None,
        *,
        target: Tensor | None = None,
        nag: Nag | None = None,
        exact: bool = False,
    ) -> Tensor:
        """Predict x0 - noise.

        latents: (B, 16, h, w), any float type, h and w even latent cells (picture pixels / 8).
        t: (B,) float32 model time in [0, 1], 1 - sigma; or a run's moment, which knows `target` and `exact` itself.
        captions: what encode_captions() returned, or its input.
        control: steers through the control branch, which must be there.
        target: (B,) the time the answer is for, of TwinFlow's weights. nag: guidance inside the layers' attention.
        exact: round where the reference implementation does, see shared.ops.
        Returns (B, 16, h, w) float32. Raises ValueError for odd sizes or a caption count other than B.
        """
        moment = t if isinstance(t, Moment) else Moment(Timetable(t, target, exact=exact))
        if not isinstance(captions, Captions):
            captions = self.encode_captions(captions, exact=moment.table.exact)
        batch, _, height, width = latents.shape
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"latents of {width}x{height} cells do not divide into {patch}x{patch} patches")
        if len(captions.lengths) != batch:
            raise ValueError(f"{len(captions.lengths)} captions for {batch} latents")

        rows, columns = height // patch, width // patch
        count = rows * columns
        image_rope, joint_rope, mask = self.rope.for_image(captions.lengths, rows, columns, latents.device)
        moment.table.embed(self._embed_time)

        x_BND = self.x_embedder(patchify(latents.to(self.dtype), patch))
        x_BND = pad_tokens(x_BND, image_rope.shape[1], self.x_pad_token)
        is_rounded_freely = not (moment.table.exact or torch.is_grad_enabled())
        if is_rounded_freely and control is None and x_BND.is_cpu and x_BND.dtype == torch.bfloat16:
            # Norms compute in float32 anyway: a stream of it saves a copy before each and one behind it.
            x_BND = x_BND.float()
        image_rope = as_read(image_rope)
        follower = None
        if control is not None:
            if self.control is None:
                raise ValueError("a control signal for a transformer without a control branch")
            follower = self.control.follow(control, x_BND, image_rope, moment, self.x_pad_token)
        for i, block in enumerate(self.noise_refiner):
            x_BND = block(x_BND, image_rope, None, moment)
            if follower is not None:
                x_BND = follower.after_refiner(i, x_BND)

        x_BSD = torch.cat([x_BND, captions.tokens_BLD], dim=1)
        if follower is not None:
            follower.join(x_BSD, captions.tokens_BLD, joint_rope, mask)
        image, joint, rope = x_BND.shape[1], x_BSD.shape[1], joint_rope
        del x_BND  # its memory is wanted
        view: Tensor | TwoViews | None = mask
        if nag is not None:
            x_BSD = torch.cat([x_BSD, nag.negative.tokens_BLD], dim=1)
            rope, negative_mask = self.rope.with_negative(joint_rope, image, captions.lengths, nag.negative.lengths)
            view = TwoViews(image, joint - image, mask, negative_mask, nag.guidance.combine)
        rope = as_read(rope)
        for i, block in enumerate(self.layers):
            x_BSD = block(x_BSD, rope, view, moment)
            if follower is not None:  # whose hints are for the image and its caption
                x_BSD = torch.cat([follower.after_layer(i, x_BSD[:, :joint]), x_BSD[:, joint:]], dim=1)

        patches = self.final_layer(x_BSD[:, :count], moment)
        return unpatchify(patches.float(), rows, columns, patch)

    def encode_captions(self, features: Sequence[Tensor], *, exact: bool = False) -> Captions:
        """Embed and refine caption features: (tokens, cap_feat_dim) each, of any length from 1 on."""
        lengths = tuple(round_up(len(f)) for f in features)
        longest = max(lengths)
        tokens = [
            pad_tokens(self.cap_embedder(f.to(self.dtype))[None], n, self.cap_pad_token)
            for f, n in zip(features, lengths, strict=True)
        ]
        x_BLD = torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in tokens])
        rope = self.rope.for_caption(longest, x_BLD.device)
        mask = length_mask(lengths, 0, x_BLD.device)
        for block in self.context_refiner:
            x_BLD = block(x_BLD, rope, mask, None, exact=exact)
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

    def use_attention(self, backend: Backend) -> None:
        """From now on attend by this backend wherever nothing is masked."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def preprocess_loras(self, _model_type: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called by a Wan2GP host before mmgp loads a LoRA: rename and stack it for the fused linears."""
        return fuse(self, state)


class CaptionNorm(nn.RMSNorm):
    """Of caption features. Computed once a picture, so it always rounds where the reference does."""

    def forward(self, features_LC: Tensor) -> Tensor:
        return ops.rms_norm_modulate(features_LC, self.weight, None, self.eps or 0.0, exact=True)


class FinalLayer(nn.Module):
    """LayerNorm without weights, scaled by the time, then down to patches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, config.dim))

    def forward(self, x_BND: Tensor, moment: Moment) -> Tensor:
        scale: Tensor = moment.of(self)
        return self.linear((F.layer_norm(x_BND, x_BND.shape[-1:], eps=1e-6) * scale).to(scale.dtype))

    def factors(self, time_RT: Tensor, *, exact: bool, apart: bool) -> Sequence[Tensor]:
        """See modulation.Timed: the scales, (R or 1, 1, D)."""
        scale = 1 + self.adaLN_modulation(time_RT)[:, None]
        return scale.split(1) if apart else [scale]


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

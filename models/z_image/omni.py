"""Z-Image Omni and Edit: the same network looking at reference pictures besides the caption.

    caption pieces, refined together ---------------------------------------------+
    references' latents (clean), latents (noisy) --noise_refiner, together--------+--> [caption, images, SigLIP]
    SigLIP's features of the references --siglip_embedder, siglip_refiner---------+     --layers--> final_layer on the
                                                                                       latents' tokens --> unpatchify

A reference is given twice: as latents of the VAE, which say how it looks, and as features of SigLIP 2, which say what
it shows. The chat template has a place for each picture, the one to be drawn last, so that the prompt comes in pieces
between them: with n references n + 2 pieces, without any one. What stands for a reference is clean: its tokens, and
the caption's pieces before it, are modulated as at time 1 (no noise), all others as at the time of the step.

Sources: diffusers 0.42.1 models/transformers/transformer_z_image.py (patchify_and_embed_omni and what it calls) and
pipelines/z_image/pipeline_z_image_omni.py. No weights are published, so diffusers is followed to the letter, also
where it looks unintended:
* Each caption piece is padded to a multiple of 32 tokens with positions that go on, but the next piece's positions
  begin behind so many zeros as there was padding: from the second piece on, tokens and positions are out of step.
* SigLIP's features (rows, columns, width) are flattened as (width, rows, columns), which mixes them.
* SigLIP's tokens lie on the grid of the latents' cells, the latents' own tokens on that of 2x2 cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from models.z_image.block import Block
from models.z_image.config import SEQUENCE_MULTIPLE
from models.z_image.modulation import Factors, Moment, Timetable
from models.z_image.patches import pad_tokens, patchify, round_up, unpatchify
from models.z_image.transformer import ZImageTransformer

if TYPE_CHECKING:
    from models.z_image.config import TransformerConfig
    from models.z_image.control import ControlSignal
    from models.z_image.modulation import Timed
    from models.z_image.transformer import Captions, Nag


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """A picture to go by. latents: (16, h, w), h and w even. features: (rows, columns, siglip_feat_dim), SigLIP's."""

    latents: Tensor
    features: Tensor


class Sequences(NamedTuple):
    """What stays the same at every step: caption and SigLIP tokens refined, references embedded.

    Tokens are (1, count, D) in the network's type, positions (1, count, 3) whole numbers, is_noisy (count,) bool.
    target: where the picture to be drawn is on the first rotary axis.
    """

    caption: Tensor
    caption_positions: Tensor
    caption_is_noisy: Tensor
    references: Tensor
    reference_positions: Tensor
    siglip: Tensor
    siglip_positions: Tensor
    siglip_is_noisy: Tensor
    target: int


class TokenMoment(NamedTuple):
    """The time of one forward where some tokens are clean. table: its rows are the step's time and 1. row: (S,), each
    token's. It stands in for a Moment, with factors for each token instead of each picture."""

    table: Timetable
    row: Tensor

    def of(self, module: Timed) -> Any:
        factors: Factors = self.table.factors(module, None)
        return factors._replace(
            attention_scale=self._spread(factors.attention_scale),
            attention_gate=self._spread(factors.attention_gate),
            ffn_scale=self._spread(factors.ffn_scale),
            ffn_gate=self._spread(factors.ffn_gate),
        )

    def _spread(self, factor_21D: Tensor | None) -> Tensor | None:
        """(2, 1, D) -> (1, S, D)"""
        return None if factor_21D is None else factor_21D[self.row, 0][None]


class OmniTransformer(ZImageTransformer):
    """ZImageTransformer with the parts that look at SigLIP's features."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        width, dim = config.siglip_feat_dim, config.dim
        self.siglip_embedder = nn.Sequential(nn.RMSNorm(width, eps=config.norm_eps), nn.Linear(width, dim))
        self.siglip_refiner = nn.ModuleList(Block(config, modulated=False) for _ in range(config.n_refiner_layers))
        self.siglip_pad_token = nn.Parameter(torch.empty(1, dim))

    def forward(
        self,
        latents: Tensor,
        t: Tensor | Moment,
        captions: Sequences | Captions | Sequence[Tensor],
        control: ControlSignal | None = None,
        *,
        target: Tensor | None = None,
        nag: Nag | None = None,
        exact: bool = False,
    ) -> Tensor:
        """Predict x0 - noise: (B, 16, h, w) float32.

        captions: from encode_references(), for all pictures of the batch alike; t is then the same time for all, or a
        moment. With anything else the network works as the plain one does, see there.
        """
        if not isinstance(captions, Sequences):
            return super().forward(latents, t, captions, control, target=target, nag=nag, exact=exact)
        if isinstance(t, Moment):
            exact, target = t.table.exact, t.table.target
            t = t.table.t if t.row is None else t.table.t[t.row : t.row + 1]
        if control is not None or target is not None or nag is not None:
            raise ValueError("reference pictures go with plain times only, not with control, TwinFlow or NAG")
        given, device = captions, latents.device
        batch, _, height, width = latents.shape
        patch = self.config.patch_size
        rows, columns = height // patch, width // patch
        table = Timetable(torch.cat([t[:1], torch.ones_like(t[:1])]), exact=exact)
        table.embed(self._embed_time)

        x_BND = self.x_embedder(patchify(latents.to(self.dtype), patch))
        x_BND = pad_tokens(x_BND, round_up(rows * columns), self.x_pad_token)
        count, before = x_BND.shape[1], given.references.shape[1]
        x_BND = torch.cat([given.references.expand(batch, -1, -1), x_BND], dim=1)
        positions = torch.cat([given.reference_positions, _grid(given.target, rows, columns, count)], dim=1)
        image_is_noisy = torch.arange(before + count, device=device) >= before
        rope, moment = self.rope.at(positions, device), _moment(table, image_is_noisy)
        for block in self.noise_refiner:
            x_BND = block(x_BND, rope, None, moment)

        parts = [given.caption.expand(batch, -1, -1), x_BND, given.siglip.expand(batch, -1, -1)]
        x_BSD = torch.cat(parts, dim=1)
        positions = torch.cat([given.caption_positions, positions, given.siglip_positions], dim=1)
        is_noisy = torch.cat([given.caption_is_noisy, image_is_noisy, given.siglip_is_noisy])
        rope, moment = self.rope.at(positions, device), _moment(table, is_noisy)
        for block in self.layers:
            x_BSD = block(x_BSD, rope, None, moment)

        begin = given.caption.shape[1] + before
        patches = self.final_layer(x_BSD[:, begin : begin + rows * columns], Moment(table, 0))
        return unpatchify(patches.float(), rows, columns, patch)

    def encode_references(
        self, pieces: Sequence[Tensor], references: Sequence[Reference] = (), *, exact: bool = False
    ) -> Sequences:
        """Refine the caption's pieces and embed the references, on the device that they are on.

        pieces: (tokens, cap_feat_dim) each, len(references) + 2 of them, or one where there are no references.
        Raises ValueError for another number.
        """
        expected = len(references) + 2 if references else 1
        if len(pieces) != expected:
            raise ValueError(f"{len(references)} references need {expected} pieces of caption, got {len(pieces)}")
        device = pieces[0].device
        positions, ends, is_noisy, tokens, begin = [], [], [], [], 1
        for number, piece in enumerate(pieces):
            length = round_up(len(piece))
            tokens.append(pad_tokens(self.cap_embedder(piece.to(self.dtype))[None], length, self.cap_pad_token))
            positions += [_line(begin, length), torch.zeros(1, length - len(piece), 3, dtype=torch.int64)]
            is_noisy.append(torch.full((length,), number >= len(references), device=device))
            begin += len(piece)
            ends.append(begin)
            begin += 2  # a place for the picture's latents and one for its features
        caption = torch.cat(tokens, dim=1)
        caption_positions = torch.cat(positions, dim=1)[:, : caption.shape[1]]
        caption = self._refine(self.context_refiner, caption, caption_positions, exact)
        images, image_positions = self._embed_images(references, ends)
        siglip, siglip_positions, siglip_is_noisy = self._embed_features(references, ends, exact)
        return Sequences(
            caption=caption,
            caption_positions=caption_positions,
            caption_is_noisy=torch.cat(is_noisy),
            references=images.to(device),
            reference_positions=image_positions,
            siglip=siglip.to(device),
            siglip_positions=siglip_positions,
            siglip_is_noisy=siglip_is_noisy.to(device),
            target=ends[len(references)],
        )

    def _embed_images(self, references: Sequence[Reference], ends: Sequence[int]) -> tuple[Tensor, Tensor]:
        tokens, positions = [self._nothing()], [torch.zeros(1, 0, 3, dtype=torch.int64)]
        patch = self.config.patch_size
        for reference, end in zip(references, ends, strict=False):
            rows, columns = (side // patch for side in reference.latents.shape[1:])
            length = round_up(rows * columns)
            embedded = self.x_embedder(patchify(reference.latents[None].to(self.dtype), patch))
            tokens.append(pad_tokens(embedded, length, self.x_pad_token))
            positions.append(_grid(end, rows, columns, length))
        return torch.cat(tokens, dim=1), torch.cat(positions, dim=1)

    def _embed_features(
        self, references: Sequence[Reference], ends: Sequence[int], exact: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """SigLIP's tokens of every reference, and one block of padding in the place of the picture to be drawn."""
        if not references:
            return self._nothing(), torch.zeros(1, 0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
        tokens, positions = [], []
        for reference, end in zip(references, ends, strict=False):
            rows, columns, width = reference.features.shape
            flat = reference.features.permute(2, 0, 1).reshape(1, rows * columns, width)
            length = round_up(rows * columns)
            tokens.append(pad_tokens(self.siglip_embedder(flat.to(self.dtype)), length, self.siglip_pad_token))
            on_grid = _grid(end + 1, rows, columns, length).float()
            cells = reference.latents.shape[1:]
            for axis, count in ((1, rows), (2, columns)):
                on_grid[..., axis] = on_grid[..., axis] / max(count - 1, 1) * (cells[axis - 1] - 1)
            positions.append(on_grid.to(torch.int64))
        clean = sum(part.shape[1] for part in tokens)
        tokens.append(self.siglip_pad_token.expand(1, SEQUENCE_MULTIPLE, -1).to(self.dtype))
        positions.append(torch.zeros(1, SEQUENCE_MULTIPLE, 3, dtype=torch.int64))
        joined, places = torch.cat(tokens, dim=1), torch.cat(positions, dim=1)
        joined = self._refine(self.siglip_refiner, joined, places, exact)
        return joined, places, torch.arange(joined.shape[1]) >= clean

    def _refine(self, blocks: nn.ModuleList, x_1LD: Tensor, positions: Tensor, exact: bool) -> Tensor:
        rope = self.rope.at(positions, x_1LD.device)
        for block in blocks:
            x_1LD = block(x_1LD, rope, None, None, exact=exact)
        return x_1LD

    def _nothing(self) -> Tensor:
        """No tokens."""
        return self.x_pad_token.new_zeros(1, 0, self.config.dim)


def _moment(table: Timetable, is_noisy: Tensor) -> TokenMoment:
    return TokenMoment(table, (~is_noisy).long())  # row 0 is the step's time, row 1 the clean one


def _line(begin: int, length: int) -> Tensor:
    """(1, length, 3): positions of a caption piece."""
    positions = torch.zeros(1, length, 3, dtype=torch.int64, device="cpu")
    positions[0, :, 0] = torch.arange(begin, begin + length, device="cpu")
    return positions


def _grid(place: int, rows: int, columns: int, length: int) -> Tensor:
    """(1, length, 3): positions of a picture's tokens, row by row; padding at 0."""
    positions = torch.zeros(1, length, 3, dtype=torch.int64, device="cpu")
    positions[0, : rows * columns, 0] = place
    positions[0, : rows * columns, 1:] = torch.cartesian_prod(
        torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu")
    )
    return positions

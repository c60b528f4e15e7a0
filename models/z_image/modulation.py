"""What the time alone decides in each block: worked out for all steps of a run at once, one product per block.

    the run's times --Timetable--> their embeddings --each block's adaLN--> Factors of every step

A block asks the Moment it is called with for its Factors. That happens inside the block's own forward, because an
offloader brings a block's weights for that and no longer, and goes through the block's modules, so that LoRA hooks and
packed weights have their say. The first forward of a run so computes the factors of all its steps; the others read
them. Shape legend: transformer.py, and R rows of times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from models.z_image.block import Block


class Factors(NamedTuple):
    """What a block multiplies by at one time, the same for all tokens of a picture.

    Norm weights are (D,), those of queries and keys (2, E). Scales are 1 + adaLN's, gates the tanh of adaLN's,
    (B or 1, 1, D); None where there is nothing to multiply by, or the weight of the norm before it holds it already.
    """

    attention_norm1: Tensor
    attention_scale: Tensor | None
    attention_norm2: Tensor
    attention_gate: Tensor | None
    ffn_norm1: Tensor
    ffn_scale: Tensor | None
    ffn_norm2: Tensor
    ffn_gate: Tensor | None
    qk_norm: Tensor
    exact: bool


class Timed(Protocol):
    """A module that knows what it makes of times."""

    def factors(self, time_RT: Tensor, *, exact: bool, apart: bool) -> Sequence[Any]:
        """apart: each row is a time of its own, and gets an entry; else the rows are the pictures of one batch."""


class Timetable:
    """Times that the network is asked about, and what its modules make of them.

    exact: keep the reference's rounding, see shared.ops. computed: how often factors were worked out, for reports.
    """

    def __init__(self, t: Tensor, target: Tensor | None = None, *, exact: bool = False) -> None:
        """t: (R,) float32 model times, 1 - sigma. target: (R,) the times that answers are for, of TwinFlow's."""
        self.t, self.target, self.exact = t, target, exact
        self._embedded: Tensor | None = None
        self._factors: dict[Timed, Sequence[Any]] = {}

    def forget(self) -> None:
        """Work everything out anew: weights that it comes from are different now."""
        self._embedded = None
        self._factors.clear()

    def embed(self, embedding: Any) -> None:
        """Embed the times by embedding(t, target) -> (R, T), unless that is done."""
        if self._embedded is None:
            self._embedded = embedding(self.t, self.target)

    def knows(self, module: Timed) -> bool:
        """Whether this module's factors of all times have been worked out."""
        return module in self._factors

    def factors(self, module: Timed, row: int | None) -> Any:
        """What `module` makes of the time in `row`, None for all rows as one batch."""
        assert self._embedded is not None  # embed() comes first in a forward
        if row is None:
            return module.factors(self._embedded, exact=self.exact, apart=False)[0]
        if module not in self._factors:
            self._factors[module] = module.factors(self._embedded, exact=self.exact, apart=True)
        return self._factors[module][row]


class Moment(NamedTuple):
    """The time of one forward: a row of a timetable for all pictures, or None: a row for each."""

    table: Timetable
    row: int | None = None

    def of(self, module: Timed) -> Any:
        return self.table.factors(module, self.row)


def block_factors(block: Block, time_RT: Tensor | None, *, exact: bool, apart: bool) -> list[Factors]:
    """A block's factors; time_RT is None for a block without modulation.

    Where no rounding is to be kept, scales and gates are worked out in float32 and multiplied into the norms' weights:
    one pass over the activations less for each.
    """
    norms = [block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2]
    attention1, attention2, ffn1, ffn2 = (norm_weight(norm) for norm in norms)
    heads = torch.stack((norm_weight(block.attention.q_norm), norm_weight(block.attention.k_norm)))
    if time_RT is None:
        return [Factors(attention1, None, attention2, None, ffn1, None, ffn2, None, heads, exact)]
    four_RD = block.adaLN_modulation(time_RT)
    dtype = four_RD.dtype
    wide = four_RD[:, None] if exact else four_RD[:, None].float()
    scale_a, gate_a, scale_f, gate_f = wide.chunk(4, dim=-1)
    factors = [1 + scale_a, gate_a.tanh(), 1 + scale_f, gate_f.tanh()]
    rows = len(time_RT)
    if exact or not (apart or rows == 1):
        parts = [factor.to(dtype) for factor in factors]
        if apart:
            attention1, attention2, ffn1, ffn2 = (w.clone() for w in (attention1, attention2, ffn1, ffn2))
        chunks = [part.split(1) if apart else (part,) for part in parts]
        return [
            Factors(attention1, sa, attention2, ga, ffn1, sf, ffn2, gf, heads, exact)
            for sa, ga, sf, gf in zip(*chunks, strict=True)
        ]
    weights = (attention1, attention2, ffn1, ffn2)
    # On a CPU a product of two types makes a copy of the narrower first; a GPU's kernels read what there is.
    kept = torch.float32 if heads.device.type == "cpu" else dtype
    heads = heads.to(kept)
    folded = [(w * factor[:, 0]).to(kept).unbind() for w, factor in zip(weights, factors, strict=True)]
    return [
        Factors(a1, None, a2, None, f1, None, f2, None, heads, exact) for a1, a2, f1, f2 in zip(*folded, strict=True)
    ]


def norm_weight(norm: nn.RMSNorm) -> Tensor:
    """The weight that a norm really works with: its own, or what hooks (LoRA) make of it, found by asking the norm."""
    if not norm._forward_hooks and "forward" not in vars(norm):
        return norm.weight
    answer: Tensor = norm(torch.ones_like(norm.weight))
    return answer * math.sqrt(1 + (norm.eps or 0.0))

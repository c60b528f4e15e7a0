"""Fun ControlNet: a second, shorter transformer that steers the first with a picture.

    control context (B,C,h,w) --patchify--> x_embedder --noise_refiner--> joined with the captions --layers-->
                                                     |                                                |
                                             hints for the trunk's                            hints for the trunk's
                                             noise refiner (2.x)                              layers at `places`

A hint is a residual: the trunk block computes as ever, then weight * hint is added to all its tokens. The branch sees
the trunk's stream once per stage, where its first block adds it to its own; from there on the two run side by side.
Hints are made when the trunk reaches the place that wants them, so that one at a time is held in memory.

    release                 layers  context channels                       refiner
    Union 1.0                  6    16: control latents                    "plain": refines the context, gives no hints
    Union 2.0                 15    33: control latents, keep mask,        "layers": was trained with the 15 layers in
                                        latents of the picture to repaint  its place; its own was never trained
    2.1, 8-step, Tile, Base   15    33                                     "own"
    2.1-lite                   3    33                                     "own"

In the keep mask 1 keeps and 0 repaints; without inpainting the last 17 channels are 0. Shape legend: transformer.py.
Sources: aigc-apps/VideoX-Fun videox_fun/models/z_image_transformer2d_control.py and config/z_image/*.yaml; the branch
agrees with diffusers 0.42.1 ZImageControlNetModel. diffusers' pipeline leaves the refiner's hints out of the trunk,
which VideoX-Fun (where the files were trained), Wan2GP and this program put in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.z_image.block import Block
from models.z_image.config import TransformerConfig
from models.z_image.control_config import ControlConfig
from models.z_image.modulation import Moment
from models.z_image.patches import pad_tokens, patchify


class ControlSignal(NamedTuple):
    """What steers one forward: the context (B or 1, in_channels, h, w), one for all images if 1, and its weight."""

    context: Tensor
    weight: float


class ControlBlock(Block):
    """A modulated block that also gives a hint; the first of a stage takes the trunk's stream in."""

    def __init__(self, config: TransformerConfig, *, first: bool) -> None:
        super().__init__(config)
        if first:
            self.before_proj = nn.Linear(config.dim, config.dim)
        self.after_proj = nn.Linear(config.dim, config.dim)

    def forward(  # type: ignore[override]
        self, c_BSD: Tensor, rope: Tensor, mask: Tensor | None, moment: Moment, trunk_BSD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(the branch's stream, the hint). trunk_BSD: the trunk's stream, for the first block of a stage only.

        Both projections are in here because an offloader brings a block's weights for its forward and no longer.
        """
        if trunk_BSD is not None:
            c_BSD = self.before_proj(c_BSD) + trunk_BSD
        c_BSD = super().forward(c_BSD, rope, mask, moment)
        return c_BSD, self.after_proj(c_BSD)


class ControlBranch(nn.Module):
    """The branch's weights; `follow` starts it beside a forward of the trunk."""

    def __init__(self, config: TransformerConfig, control: ControlConfig) -> None:
        super().__init__()
        self.config = control
        self.patch_size = config.patch_size
        self.x_embedder = nn.Linear(config.patch_size**2 * control.in_channels, config.dim)
        refiners = 0 if control.refiner == "layers" else config.n_refiner_layers
        self.noise_refiner = nn.ModuleList(
            Block(config) if control.refiner == "plain" else ControlBlock(config, first=i == 0) for i in range(refiners)
        )
        self.layers = nn.ModuleList(ControlBlock(config, first=i == 0) for i in range(len(control.places)))

    def follow(self, signal: ControlSignal, x_BND: Tensor, rope: Tensor, moment: Moment, pad_token: Tensor) -> Follower:
        """Begin beside the trunk's embedded, not yet refined image tokens (B, N, D). Raises ValueError for a context
        of other channels, size or batch."""
        batch, count = x_BND.shape[0], x_BND.shape[1]
        context = signal.context.to(x_BND.dtype)
        if context.shape[1] != self.config.in_channels:
            raise ValueError(f"a control context of {context.shape[1]} channels, expected {self.config.in_channels}")
        tokens = patchify(context, self.patch_size)
        if tokens.shape[0] not in (1, batch) or not count - 32 < tokens.shape[1] <= count:
            raise ValueError(f"control context {list(context.shape)} does not go with {batch} images of {count} tokens")
        c_BND = pad_tokens(self.x_embedder(tokens), count, pad_token).expand(batch, -1, -1)
        return Follower(self, c_BND, x_BND, rope, moment, signal.weight)


class Follower:
    """One pass of the branch, led by the trunk: after_refiner() for each refiner block, join(), after_layer()."""

    def __init__(
        self,
        branch: ControlBranch,
        c_BND: Tensor,
        x_BND: Tensor,
        rope: Tensor,
        moment: Moment,
        weight: float,
    ) -> None:
        self._branch, self._config, self._weight = branch, branch.config, weight
        self._stream, self._moment = c_BND, moment
        self._trunk: Tensor | None = x_BND  # until the stage's first block has taken it in
        self._rope = rope
        self._mask: Tensor | None = None
        stage = branch.layers if self._config.refiner == "layers" else branch.noise_refiner
        self._waiting = list(stage)

    def after_refiner(self, index: int, x_BND: Tensor) -> Tensor:
        """The trunk's stream after its refiner block `index`, with the hint if this place gets one."""
        if index not in self._config.refiner_places:
            return x_BND
        return x_BND + self._weight * self._next_hint()

    def join(self, x_BSD: Tensor, captions_BLD: Tensor, rope: Tensor, mask: Tensor | None) -> None:
        """Go on beside the trunk's layers: x_BSD is what their first gets, image and caption tokens.

        Runs what of the refiner stage nobody wanted a hint of: all of a plain one, 13 of the 15 layers of a 2.0 one.
        """
        while self._waiting:
            if self._config.refiner == "plain":
                self._stream = self._waiting.pop(0)(self._stream, self._rope, None, self._moment)
            else:
                self._next_hint()
        self._stream = torch.cat([self._stream, captions_BLD], dim=1)
        self._trunk, self._rope, self._mask = x_BSD, rope, mask
        self._waiting = list(self._branch.layers)

    def after_layer(self, index: int, x_BSD: Tensor) -> Tensor:
        """The trunk's stream after its layer `index`, with the hint if this place gets one."""
        if index not in self._config.places:
            return x_BSD
        return x_BSD + self._weight * self._next_hint()

    def _next_hint(self) -> Tensor:
        self._stream, hint = self._waiting.pop(0)(self._stream, self._rope, self._mask, self._moment, self._trunk)
        self._trunk = None
        return hint

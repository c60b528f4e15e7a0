"""A second, dense task while the transformer learns: image tokens say what stands nearest, and where.

From the diffusion loss alone a small transformer is slow to find out which words belong to which place: a
shape covers few tokens, and only the noisiest tenth of the sigmas needs the caption at all. Linear heads on
the last layer's image tokens therefore also predict the nearest shape's kind, colour and size and the way
to its centre. They see the same noisy input and caption, teach the same layers, and are thrown away with
the optimizer. (The idea of REPA, arXiv 2410.06940, with known answers in place of another network's
features.)
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.scenes import COLOURS, KINDS, SIZES, Scene, shape_centre

_PIXELS_PER_TOKEN = 16
_OFFSET_WEIGHT = 15.0  # offsets are small numbers, and the hardest to learn
_CLASSES: dict[str, list[str]] = {"kind": list(KINDS), "colour": list(COLOURS), "size": list(SIZES)}


class DeepLayoutHeads(nn.Module):
    """Readers at three depths: after the first joint layer where a token is itself, then what stands nearest, twice.

    The network has no absolute positions: a token finds out where it is by its angle to the caption's tokens. Asked
    only at the end, it does so only in the last layer, when it is too late to draw anything there.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.position = nn.Linear(dim, 2)
        self.middle = LayoutHeads(dim)
        self.last = LayoutHeads(dim)

    def forward(self, features: list[Tensor], scenes: list[Scene], width: int, height: int) -> Tensor:
        """features: (B, at least all image tokens, dim) after the first, the second and the last layer."""
        rows, columns = height // _PIXELS_PER_TOKEN, width // _PIXELS_PER_TOKEN
        first, middle, last = (f[:, : rows * columns] for f in features)
        y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
        own = torch.stack([x.flatten(), y.flatten()], -1).expand(len(scenes), -1, -1)
        position = self.position(F.layer_norm(first.float(), (self.dim,)))
        loss = _OFFSET_WEIGHT * F.smooth_l1_loss(position, own, beta=0.1)
        return loss + self.middle(middle, scenes, width, height) + self.last(last, scenes, width, height)


class LayoutHeads(nn.Module):
    """Linear readers of (B, tokens, dim) features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.classes = nn.ModuleDict({name: nn.Linear(dim, len(values)) for name, values in _CLASSES.items()})
        self.offset = nn.Linear(dim, 2)

    def forward(self, features: Tensor, scenes: list[Scene], width: int, height: int) -> Tensor:
        """Mean loss over all image tokens; width and height in pixels."""
        x = F.layer_norm(features.float(), (self.dim,))
        targets, offsets = layout_targets(scenes, width, height)
        loss = _OFFSET_WEIGHT * F.smooth_l1_loss(self.offset(x), offsets, beta=0.1)
        for name, head in self.classes.items():
            loss = loss + F.cross_entropy(head(x).flatten(0, 1), targets[name].flatten())
        return loss


def layout_targets(scenes: list[Scene], width: int, height: int) -> tuple[dict[str, Tensor], Tensor]:
    """For each image token the nearest shape's class indices (B, tokens), and the way to its centre (B, tokens, 2).

    The way (x, y) is measured in units of the shorter side.
    """
    ys, xs = np.mgrid[0 : height // _PIXELS_PER_TOKEN, 0 : width // _PIXELS_PER_TOKEN]
    tokens = (np.stack([xs.ravel(), ys.ravel()], -1) + 0.5) * _PIXELS_PER_TOKEN
    classes: dict[str, list[np.ndarray]] = {name: [] for name in _CLASSES}
    offsets = []
    for scene in scenes:
        ways = np.stack([shape_centre(s, width, height) - tokens for s in scene.shapes]) / min(width, height)
        nearest = np.linalg.norm(ways, axis=-1).argmin(0)
        offsets.append(ways[nearest, np.arange(len(tokens))])
        for name, values in _CLASSES.items():
            classes[name].append(np.array([values.index(getattr(s, name)) for s in scene.shapes])[nearest])
    targets = {name: torch.from_numpy(np.stack(rows)) for name, rows in classes.items()}
    return targets, torch.from_numpy(np.stack(offsets)).float()

"""Guidance: how the network's answers for the prompt and for the negative prompt become one velocity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ClassifierFreeGuidance:
    """positive + scale * (positive - negative): the form of Z-Image's own pipeline, Wan2GP and diffusers.

    scale: 0 is off. The textbook scale (which is 1 when off) is this one plus 1.
    normalization: 0 is off, else the result's norm is kept below this multiple of the positive answer's norm.
    truncation: guidance stops once the model time 1 - sigma exceeds this; 1 never stops.
    Source: Ho & Salimans 2022, arXiv 2207.12598; Tongyi-MAI/Z-Image src/zimage/pipeline.py.
    """

    scale: float = 0.0
    normalization: float = 0.0
    truncation: float = 1.0

    def active(self, sigma: float) -> bool:
        """Whether the negative prompt is needed at this sigma."""
        return self.scale > 0 and 1 - sigma <= self.truncation

    def combine(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Guide (B, C, h, w) predictions of one type; each image's norm is its own."""
        guided = positive + self.scale * (positive - negative)
        if self.normalization <= 0:
            return guided
        limit = self.normalization * torch.linalg.vector_norm(positive, dim=(1, 2, 3), keepdim=True)
        norm = torch.linalg.vector_norm(guided, dim=(1, 2, 3), keepdim=True)
        return guided * (limit / norm).clamp(max=1)

"""Guidance: how a prompt and a negative prompt make one picture, on the network's answers or inside its attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Wan2GP's for Z-Image (its handler's default settings), within the ranges of the paper.
NAG_TAU, NAG_ALPHA = 3.5, 0.5


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


@dataclass(frozen=True, slots=True)
class NormalizedAttentionGuidance:
    """NAG: the negative prompt at work in every attention of image tokens, for models without a guided second answer.

    Z+ and Z- are what an image token gathers from the picture and the prompt, and from the picture and the negative
    prompt. G = scale Z+ - (scale - 1) Z- is bounded to tau times the L1 norm of Z+, then mixed: alpha G + (1 - alpha)
    Z+. scale: 1 is off. tau, alpha: see there. Source: Chen et al. 2025, arXiv 2505.21179, section 3; the factor on
    Z+ - Z-, phi there, is scale - 1, as in the authors' code and in Wan2GP.
    """

    scale: float = 1.0
    tau: float = NAG_TAU
    alpha: float = NAG_ALPHA

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return self.scale > 1 and self.alpha > 0

    def combine(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Guide attention outputs (B, tokens, H, E) of one type; a token's norm is over all its heads."""
        guided = torch.lerp(negative, positive, self.scale)
        limit = self.tau * _l1_norm(positive)
        # min(ratio, tau) / ratio, without dividing by a norm of 0
        bound = (limit / _l1_norm(guided).clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=1)
        return torch.lerp(positive, guided * bound.type_as(guided), self.alpha)


def _l1_norm(x_BSHE: Tensor) -> Tensor:
    dtype = torch.promote_types(x_BSHE.dtype, torch.float32)  # a sum of thousands is too long for half precision
    return torch.linalg.vector_norm(x_BSHE, ord=1, dim=(-2, -1), keepdim=True, dtype=dtype)

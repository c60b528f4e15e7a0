"""Sizes of the tiny random Z-Image that tests use, and how two results are compared."""

from __future__ import annotations

import torch

from models.z_image.config import TransformerConfig

TINY = TransformerConfig(dim=384, n_layers=2, n_refiner_layers=1, n_heads=3, cap_feat_dim=64, ffn_dim=1024)


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights large enough that every part of the network matters in a comparison."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        if parameter.dim() == 1 and parameter.shape[0] > 1:
            parameter.data.add_(0.5)  # norms near one half, so that they are neither off nor the identity
    return module.eval().requires_grad_(False)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((ours - theirs).norm() / theirs.norm())

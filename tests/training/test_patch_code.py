"""The code of patches: what it restores, and that the committed file is the one the training uses."""

import numpy as np
import torch

from training.patch_code import fit_patch_code, load_patch_code
from training.scenes import draw_scene, sample_scene


def _drawings(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([draw_scene(sample_scene(rng, held_out=True), 128, 96) for _ in range(count)])


def _pixels(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_committed_code_restores_unseen_drawings() -> None:
    code, pixels = load_patch_code(), _pixels(_drawings(24, seed=5))

    latents = code.encode(pixels)

    assert latents.shape == (24, 16, 12, 16)
    assert 0.8 < float(latents.square().mean().sqrt()) < 1.2
    error = (code.decode(latents) - pixels).square().mean()
    assert 10 * torch.log10(4 / error) > 29  # dB; edges are a larger part of small drawings


def test_latents_that_the_code_can_express_come_back() -> None:
    code = load_patch_code()
    latents = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(code.encode(code.decode(latents)), latents, rtol=1e-4, atol=1e-4)


def test_fitted_code_is_ordered_orthonormal_and_of_unit_size() -> None:
    pictures = _drawings(40, seed=1)

    code = fit_patch_code(pictures)

    torch.testing.assert_close(code.components.T @ code.components, torch.eye(16), rtol=0, atol=1e-4)
    latents = code.encode(_pixels(pictures))
    assert abs(float(latents.square().mean()) - 1) < 1e-3
    deviations = latents.permute(1, 0, 2, 3).flatten(1).std(1)
    assert bool((deviations[:-1] >= deviations[1:] - 1e-4).all())

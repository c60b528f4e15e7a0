"""Guidance against the equations of its papers, written out anew in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.z_image.attention import TwoViews, attend
from models.z_image.guidance import ClassifierFreeGuidance, NormalizedAttentionGuidance
from models.z_image.loader import load_transformer
from models.z_image.transformer import Nag, ZImageTransformer
from tests.support.tiny_model import TINY, relative_error


def nag_of_the_paper(z_pos: Tensor, z_neg: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Equations 7 to 10 of arXiv 2505.21179 for one token's vector, in the notation of the authors' code."""
    extrapolated = z_pos * scale - z_neg * (scale - 1)
    ratio = extrapolated.abs().sum() / z_pos.abs().sum()
    normalised = extrapolated * min(float(ratio), tau) / ratio
    return alpha * normalised + (1 - alpha) * z_pos


@pytest.mark.parametrize(("scale", "tau", "alpha"), [(1.5, 3.5, 0.5), (5.0, 2.5, 0.25), (11.0, 3.5, 1.0)])
def test_nag_agrees_with_its_paper(scale: float, tau: float, alpha: float) -> None:
    positive, negative = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64)  # (batch, tokens, heads, width) each

    ours = NormalizedAttentionGuidance(scale, tau, alpha).combine(positive, negative)

    for image in range(3):
        for token in range(4):
            expected = nag_of_the_paper(
                positive[image, token].flatten(), negative[image, token].flatten(), scale, tau, alpha
            )
            torch.testing.assert_close(ours[image, token].flatten(), expected, rtol=1e-12, atol=1e-12)


def test_nag_is_off_at_scale_one_and_survives_a_vector_of_zeros() -> None:
    zeros = torch.zeros(1, 2, 2, 4)

    assert not NormalizedAttentionGuidance(1.0).active
    assert not NormalizedAttentionGuidance(5.0, alpha=0.0).active
    assert torch.equal(NormalizedAttentionGuidance(5.0).combine(zeros, zeros), zeros)


def test_two_views_are_two_attentions_that_do_not_see_each_other_s_caption() -> None:
    image, caption, negative = 6, 3, 5
    q, k, v = torch.randn(3, 2, 2, image + caption + negative, 8)
    views = TwoViews(image, caption, None, None, lambda a, b: a + 10 * b)

    both = attend(q, k, v, views)

    seen, other = slice(0, image + caption), [*range(image), *range(image + caption, image + caption + negative)]
    first = attend(q[:, :, seen], k[:, :, seen], v[:, :, seen])
    second = attend(q[:, :, other], k[:, :, other], v[:, :, other])
    torch.testing.assert_close(both[:, :, :image], first[:, :, :image] + 10 * second[:, :, :image])
    torch.testing.assert_close(both[:, :, image : image + caption], first[:, :, image:])
    torch.testing.assert_close(both[:, :, image + caption :], second[:, :, image:])


class Take(NormalizedAttentionGuidance):
    """Not guidance: the image goes on with one of the two views alone."""

    def __init__(self, negative: bool) -> None:
        super().__init__(2.0)
        object.__setattr__(self, "combine", lambda a, b: b if negative else a)


@pytest.fixture(scope="module")
def transformer(model_folder: Path) -> ZImageTransformer:
    return load_transformer(model_folder / "transformer.safetensors", torch.float32)


@pytest.mark.parametrize("negative", [False, True])
def test_each_view_is_the_network_s_answer_to_that_caption_alone(
    transformer: ZImageTransformer, negative: bool
) -> None:
    """Captions of different length, in a batch of different lengths: nothing is cut, padded on or moved."""
    latents, time = torch.randn(2, 16, 16, 16), torch.tensor([0.2, 0.6])  # 64 tokens: no padding, which has no place
    positives = [torch.randn(n, TINY.cap_feat_dim) for n in (10, 40)]
    negatives = [torch.randn(n, TINY.cap_feat_dim) for n in (70, 5)]
    nag = Nag(Take(negative), transformer.encode_captions(negatives))

    guided = transformer(latents, time, positives, nag=nag)
    alone = transformer(latents, time, negatives if negative else positives)

    assert relative_error(guided, alone) <= 1e-5


def test_guidance_that_is_off_gives_the_positive_answer() -> None:
    positive, negative = torch.randn(2, 1, 16, 4, 4)

    assert torch.equal(ClassifierFreeGuidance(scale=0.0).combine(positive, negative), positive)
    assert not ClassifierFreeGuidance(scale=0.0).active(0.5)
    assert not ClassifierFreeGuidance(scale=4.0, truncation=0.5).active(0.4)

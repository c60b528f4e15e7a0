"""The S3-DiT against diffusers' ZImageTransformer2DModel on the same weights, float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

from models.z_image.loader import load_transformer
from models.z_image.patches import patchify, unpatchify
from models.z_image.transformer import ZImageTransformer
from tests.support.tiny_model import TINY, relative_error

# Sums of 1024 float32 products in another order differ by some 1e-7.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ours(model_folder: Path) -> ZImageTransformer:
    return load_transformer(model_folder / "transformer.safetensors", torch.float32)


@pytest.mark.parametrize(
    ("height", "width", "tokens"),
    [
        pytest.param(16, 16, [20], id="square"),
        pytest.param(6, 10, [32], id="image tokens need padding, caption does not"),
        pytest.param(24, 16, [70], id="tall, long caption"),
        pytest.param(16, 24, [5, 5], id="batch, equal captions"),
        pytest.param(8, 16, [1, 33, 100], id="batch, captions of different padded length"),
        pytest.param(2, 2, [3], id="one image token"),
    ],
)
def test_agrees_with_diffusers(
    ours: ZImageTransformer,
    reference_transformer: ZImageTransformer2DModel,
    height: int,
    width: int,
    tokens: list[int],
) -> None:
    latents = torch.randn(len(tokens), 16, height, width)
    time = torch.rand(len(tokens))
    captions = [torch.randn(n, TINY.cap_feat_dim) for n in tokens]

    result = ours(latents, time, captions)
    theirs = reference_transformer(list(latents[:, :, None]), time, captions, return_dict=False)[0]

    assert relative_error(result, torch.stack(list(theirs))[:, :, 0]) <= TOLERANCE


def test_captions_encoded_once_give_the_same_answer(ours: ZImageTransformer) -> None:
    latents, time = torch.randn(2, 16, 8, 8), torch.tensor([0.1, 0.7])
    captions = [torch.randn(12, TINY.cap_feat_dim), torch.randn(40, TINY.cap_feat_dim)]

    encoded = ours.encode_captions(captions)

    torch.testing.assert_close(ours(latents, time, encoded), ours(latents, time, captions), rtol=0, atol=0)


def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch(ours: ZImageTransformer) -> None:
    latents, time = torch.randn(2, 16, 8, 12), torch.tensor([0.3, 0.9])
    captions = [torch.randn(10, TINY.cap_feat_dim), torch.randn(90, TINY.cap_feat_dim)]

    together = ours(latents, time, captions)
    alone = ours(latents[:1], time[:1], captions[:1])

    assert relative_error(together[:1], alone) <= TOLERANCE


def test_odd_latents_are_refused(ours: ZImageTransformer) -> None:
    with pytest.raises(ValueError, match="9x8 cells do not divide"):
        ours(torch.randn(1, 16, 8, 9), torch.zeros(1), [torch.randn(4, TINY.cap_feat_dim)])


@pytest.mark.parametrize("name", ["t_embedder_2", "extended_weights.t_embedder_2"])
def test_twinflow_adds_the_way_to_its_target(
    reference_transformer: ZImageTransformer2DModel, tmp_path: Path, name: str
) -> None:
    """E1(|t|) + |t - tt| E2(tt - t), written out on the embedding's own output."""
    state = reference_transformer.state_dict()
    second = {
        f"{name}.mlp.{part}": torch.randn_like(state[f"t_embedder.mlp.{part}"])
        for part in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    save_file(state | second, tmp_path / "twinflow.safetensors")
    model = load_transformer(tmp_path / "twinflow.safetensors", torch.float32)
    t, target = torch.tensor([0.001, 0.4]), torch.tensor([0.0, 0.7])

    ours = model._embed_time(t, target)

    way = (t - target).abs()[:, None] * model.t_embedder_2((target - t) * 1000, torch.float32)
    torch.testing.assert_close(ours, model.t_embedder(t * 1000, torch.float32) + way)
    torch.testing.assert_close(model.t_embedder_2.mlp[0].weight, second[f"{name}.mlp.0.weight"])


def test_twinflow_without_its_second_embedding_uses_the_first(ours: ZImageTransformer) -> None:
    t, target = torch.tensor([0.2]), torch.tensor([0.5])

    expected = ours.t_embedder(t * 1000, torch.float32) + 0.3 * ours.t_embedder((target - t) * 1000, torch.float32)
    torch.testing.assert_close(ours._embed_time(t, target), expected)


def test_patches_list_row_column_channel() -> None:
    latents = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)

    patches = patchify(latents, 2)

    assert patches[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]
    assert torch.equal(unpatchify(patches, 2, 2, 2), latents)


def test_the_published_sizes_have_6154908736_parameters() -> None:
    with torch.device("meta"):
        model = ZImageTransformer(type(TINY)())

    assert sum(p.numel() for p in model.parameters()) == 6_154_908_736

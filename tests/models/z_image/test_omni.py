"""Omni and Edit files: known by their tensors, and computed as diffusers computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.z_image.inspection import describe
from models.z_image.loader import load_transformer
from models.z_image.omni import OmniTransformer, Reference
from models.z_image.transformer import ZImageTransformer
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import LayerMismatchError
from tests.support.tiny_model import TINY, randomise, relative_error

TINY_OMNI = replace(TINY, siglip_feat_dim=48)


@pytest.fixture(scope="module")
def theirs() -> ZImageTransformer2DModel:
    config = {key: value for key, value in TINY_OMNI.as_diffusers().items() if not key.startswith("_")}
    return randomise(ZImageTransformer2DModel(**config), 5)


@pytest.fixture(scope="module")
def file(theirs: ZImageTransformer2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("omni") / "omni.safetensors"
    save_file(theirs.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def ours(file: Path) -> OmniTransformer:
    model = load_transformer(file, torch.float32)
    assert isinstance(model, OmniTransformer)
    return model


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_reference(height: int, width: int, rows: int, columns: int, seed: int) -> Reference:
    return Reference(numbers(16, height, width, seed=seed), numbers(rows, columns, 48, seed=seed + 1))


def pieces_of(*lengths: int) -> list[Tensor]:
    return [numbers(length, TINY.cap_feat_dim, seed=20 + i) for i, length in enumerate(lengths)]


def their_answer(
    theirs: ZImageTransformer2DModel,
    latents: Tensor,
    t: Tensor,
    pieces: Sequence[Tensor],
    references: Sequence[Reference],
) -> Tensor:
    """As ZImageOmniPipeline asks its network."""
    count = len(latents)
    given = [reference.latents[:, None] for reference in references]
    features = [reference.features for reference in references]
    answer = theirs(
        x=[[*given, picture[:, None]] for picture in latents],
        t=t,
        cap_feats=[list(pieces)] * count,
        siglip_feats=[[*features, None] if references else None] * count,
        image_noise_mask=[[0] * len(references) + [1]] * count,
        return_dict=False,
    )[0]
    return torch.stack(answer)[:, :, 0]


@pytest.mark.parametrize(
    ("lengths", "references"),
    [
        ((9,), []),
        ((5, 11, 3), [(4, 6, 3, 2)]),
        ((32, 40, 3), [(8, 8, 6, 7)]),  # nothing to pad in the first piece and the first picture's tokens
        ((7, 2, 13, 3), [(4, 6, 3, 2), (10, 4, 1, 5)]),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_answers_agree_with_diffusers(
    theirs: ZImageTransformer2DModel,
    ours: OmniTransformer,
    lengths: Sequence[int],
    references: Sequence[tuple[int, int, int, int]],
    exact: bool,
) -> None:
    given = [a_reference(*sizes, seed=40 + 2 * i) for i, sizes in enumerate(references)]
    pieces, latents, t = pieces_of(*lengths), numbers(2, 16, 6, 8, seed=30), torch.tensor([0.3, 0.3])
    with torch.no_grad():
        expected = their_answer(theirs, latents, t, pieces, given)

        sequences = ours.encode_references(pieces, given, exact=exact)
        answer = ours(latents, t, sequences, exact=exact)

    assert relative_error(answer, expected) <= 1e-5


def test_the_time_of_the_step_reaches_noisy_tokens_only(ours: OmniTransformer) -> None:
    sequences = ours.encode_references(pieces_of(5, 11, 3), [a_reference(4, 6, 3, 2, seed=40)])
    seen: list[Tensor] = []
    hook = ours.noise_refiner[0].register_forward_hook(lambda module, given, output: seen.append(output))
    latents = numbers(1, 16, 6, 8, seed=30)
    with torch.no_grad():
        attention = ours.noise_refiner[0].attention
        kept = attention.out.weight.data.clone()
        attention.out.weight.data.zero_()  # without attention a token hears of its own time alone
        for time in (0.2, 0.9):
            ours(latents, torch.tensor([time]), sequences)
        attention.out.weight.data.copy_(kept)
    hook.remove()

    clean = sequences.references.shape[1]
    assert torch.equal(seen[0][:, :clean], seen[1][:, :clean])
    assert not torch.allclose(seen[0][:, clean:], seen[1][:, clean:])


def test_without_references_it_is_also_a_plain_network(ours: OmniTransformer, theirs: ZImageTransformer2DModel) -> None:
    latents, t, caption = numbers(1, 16, 6, 8, seed=30), torch.tensor([0.3]), pieces_of(9)
    with torch.no_grad():
        expected = theirs([latents[0][:, None]], t, caption, return_dict=False)[0][0][:, 0]

        answer = ours(latents, t, caption)[0]

    assert relative_error(answer, expected) <= 1e-5


def test_the_number_of_caption_pieces_is_checked(ours: OmniTransformer) -> None:
    with pytest.raises(ValueError, match="1 references need 3 pieces of caption, got 2"):
        ours.encode_references(pieces_of(5, 3), [a_reference(4, 6, 3, 2, seed=40)])


def test_inspect_names_an_omni_file_by_its_tensors(file: Path) -> None:
    found = describe(Checkpoint.open(file))

    assert found is not None
    assert found["summary"] == "Z-Image Omni / Edit transformer"
    assert found["sizes"]["siglip_feat_dim"] == 48
    assert found["problems"] == []


@pytest.mark.parametrize(
    "lost", ["siglip_pad_token", "siglip_embedder.1.weight", "siglip_refiner.0.attention.to_k.weight"]
)
def test_a_missing_part_is_named(file: Path, tmp_path: Path, lost: str) -> None:
    state = load_file(file)
    del state[lost]
    save_file(state, tmp_path / "cut.safetensors")

    with pytest.raises(LayerMismatchError, match=lost.replace(".", r"\.")):
        load_transformer(tmp_path / "cut.safetensors", torch.float32)


def test_files_without_siglip_stay_the_plain_network(model_folder: Path) -> None:
    model = load_transformer(model_folder / "transformer.safetensors", torch.float32)

    assert type(model) is ZImageTransformer

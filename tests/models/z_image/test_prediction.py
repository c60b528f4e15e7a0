"""Whether both guided answers go to the GPU at once is decided from what they need and what is free."""

from __future__ import annotations

import pytest
import torch

from models.z_image.config import TransformerConfig
from models.z_image.prediction import _room_for_twice
from models.z_image.transformer import ZImageTransformer

GIB = 2**30


class OnGpu:
    """Latents of one 1024x1024 picture that say they are on a GPU."""

    device = torch.device("cuda", 0)

    def __getitem__(self, _: object) -> torch.Tensor:
        return torch.empty(1, 128, 128, device="meta")


@pytest.fixture(scope="module")
def published() -> ZImageTransformer:
    with torch.device("meta"):
        return ZImageTransformer(TransformerConfig()).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("free", "kept_by_torch", "fits"),
    [
        pytest.param(4 * GIB, 0, True, id="a free GPU"),
        pytest.param(GIB // 4, 0, False, id="a full one"),
        pytest.param(GIB // 4, 4 * GIB, True, id="memory that torch keeps and does not use counts as free"),
    ],
)
def test_both_answers_go_together_where_their_activations_fit(
    published: ZImageTransformer, monkeypatch: pytest.MonkeyPatch, free: int, kept_by_torch: int, fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB + kept_by_torch)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * GIB)

    assert _room_for_twice(published, OnGpu()) is fits  # type: ignore[arg-type]


def test_a_cpu_takes_both_together(published: ZImageTransformer) -> None:
    assert _room_for_twice(published, torch.zeros(1, 16, 4, 4))

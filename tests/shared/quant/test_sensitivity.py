"""The recipe entry "auto": formats chosen under a size."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from shared.quant.errors import UserError
from shared.quant.sensitivity import (
    GGUF_FORMATS,
    SAFETENSORS_FORMATS,
    SVDQ_FORMATS,
    Candidate,
    Sensitivity,
    bytes_of,
    choose,
)
from shared.quant.targets import targets


def layers(*errors: tuple[float, float], bytes: tuple[int, int, int] = (10, 20, 40)) -> list[Sensitivity]:
    """Layers of one size in three formats: small, middle, and plain without an error."""
    return [
        Sensitivity(f"layer{i}", 0.0, 4.0, tuple(
            Candidate(name, size, error) for name, size, error in zip("abc", bytes, (*pair, 0.0), strict=True)
        ))
        for i, pair in enumerate(errors)
    ]  # fmt: skip


def formats(chosen: dict[str, Candidate]) -> str:
    return "".join(candidate.format for candidate in chosen.values())


def test_bytes_go_where_they_buy_most() -> None:
    found = layers((0.1, 0.01), (0.3, 0.01), (0.1, 0.09))

    assert formats(choose(found, 30)) == "aaa"
    assert formats(choose(found, 40)) == "aba"
    assert formats(choose(found, 59)) == "bba"
    assert formats(choose(found, 120)) == "ccc"


def test_the_choice_is_nearly_the_best_of_all() -> None:
    draw = random.Random(0)
    for _ in range(20):
        found = layers(*((draw.uniform(0.05, 0.2), draw.uniform(0.001, 0.05)) for _ in range(7)))
        budget = draw.randrange(70, 280)

        chosen = choose(found, budget)

        assert sum(c.bytes for c in chosen.values()) <= budget
        every = itertools.product(*(layer.candidates for layer in found))
        best = min(sum(c.error**2 for c in some) for some in every if sum(c.bytes for c in some) <= budget)
        # One step of one layer is what a greedy choice may miss.
        assert sum(c.error**2 for c in chosen.values()) <= best + max(s.candidates[0].error ** 2 for s in found)


def test_a_size_that_nothing_fits_is_named() -> None:
    with pytest.raises(UserError, match="take 5 bytes more than there are"):
        choose(layers((0.1, 0.01)), 5)


@pytest.mark.parametrize("name", sorted({*SAFETENSORS_FORMATS, *GGUF_FORMATS}))
@pytest.mark.parametrize("shape", [(384, 1024), (1536, 256), (64, 384), (40, 96)])
def test_sizes_by_arithmetic_are_those_of_the_tensors(name: str, shape: tuple[int, int]) -> None:
    target = targets().get(name)

    counted = bytes_of(name, target, *shape)

    if target is None:
        assert counted == 2 * shape[0] * shape[1]
    else:
        made = target.quantize(torch.randn(shape).bfloat16(), 1, 0)
        assert counted == pytest.approx(sum(t.numel() * t.element_size() for t in made.values()), abs=60)


@pytest.mark.parametrize("name", SVDQ_FORMATS)
@pytest.mark.parametrize("parts", [1, 3])
def test_sizes_of_ranked_formats_are_those_of_the_tensors_at_most(name: str, parts: int) -> None:
    target = targets()[name]

    counted = bytes_of(name, target, 384, 256, 40)

    made = target.quantize(torch.randn(384, 256).bfloat16(), parts, 40)
    real = sum(t.numel() * t.element_size() for t in made.values())
    assert real <= counted <= real + 2 * 384 + 4


def test_a_format_whose_size_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match="svdq_int4 layers is not known beforehand"):
        bytes_of("svdq_int4", targets()["svdq_int4"], 128, 128)

"""LoRA strengths mean what Wan2GP's notation says, and wrong ones are quoted."""

from __future__ import annotations

import pytest

from shared.app.loras import is_strength, match_words, parse_strength, split_strengths
from shared.quant.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.8", 0.8),
        (" -1 ", -1.0),
        ("1,0.5", ((1.0, 0.5),)),
        ("1;0", ((1.0,), (0.0,))),
        ("0.9,0.8;1.2,1.1,1", ((0.9, 0.8), (1.2, 1.1, 1.0))),
        ("0;1;0", ((0.0,), (1.0,), (0.0,))),
    ],
)
def test_a_strength_is_a_number_or_phases_of_numbers(text: str, expected: object) -> None:
    assert parse_strength(text) == expected
    assert is_strength(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("strong", 'The LoRA strength "strong" is no number'),
        ("1,,2", "is no number at ''"),
        ("1;", "is no number at ''"),
        ("nan", 'The LoRA strength "nan" is no number'),
        ("1,inf", "is no number at 'inf'"),
        ("", 'The LoRA strength "" is no number'),
        ("1;0;1;0", "has 4 phases; there are at most 3"),
        ("1:0.5", 'has ":", which separates the branches'),
    ],
)
def test_what_is_no_strength_is_quoted(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_strength(text)
    assert not is_strength(text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", []),
        ("1 0.8", ["1", "0.8"]),
        ("# style\n1,0.5\n  # face\n0;1\n", ["1,0.5", "0;1"]),
        ("1|0.8 0.2", ["1", "0.8", "0.2"]),
        ([1, " 0.5 "], ["1", "0.5"]),
    ],
)
def test_strengths_are_separated_by_spaces_lines_and_one_bar(value: object, expected: list[str]) -> None:
    assert split_strengths(value) == expected  # type: ignore[arg-type]


def test_a_second_bar_is_an_error() -> None:
    with pytest.raises(UserError, match=r'have 2 "\|"; one may separate two groups'):
        split_strengths("1|2|3")


@pytest.mark.parametrize(
    ("unmatched", "expected"),
    [
        ([], "style.safetensors: 8 of 8 keys matched"),
        (["a", "b"], "style.safetensors: 6 of 8 keys matched; not a, b"),
        (["a", "b", "c", "d", "e"], "style.safetensors: 3 of 8 keys matched; not a, b, c and 2 more"),
    ],
)
def test_a_match_is_told_in_one_line(unmatched: list[str], expected: str) -> None:
    match = {"file": "loras/style.safetensors", "matched": 8 - len(unmatched), "total": 8, "unmatched": unmatched}

    assert match_words(match) == expected

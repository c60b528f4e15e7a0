"""What is expected of formats, held against rows that keep it and rows that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.app.compare import Row
from shared.app.format_order import chance, findings

BF16 = Row(name="bf16", file="", bytes=100, adherence=0.9, lora=1.0, lora_latents=1.0)


def row(name: str, latent_error: float, size: int = 50) -> Row:
    return Row(
        name=name, file="", bytes=size, latent_error=latent_error, adherence=0.9, lora=0.99, lora_latents=0.99
    )  # fmt: skip


ROWS = {
    "int8": row("int8", 0.01, 60),
    "nvfp4": row("nvfp4", 0.08),
    "svdq_int4_r32": row("svdq_int4_r32", 0.06),
    "svdq_int4_r256": row("svdq_int4_r256", 0.01, 55),
}


def test_what_is_expected_holds_of_rows_in_order() -> None:
    found = findings([BF16, *ROWS.values()], 32)

    assert len(found) == 8
    assert all(said.holds for said in found)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("int8", {"adherence": 0.875}, "the worst, int8, 2.5 points fewer than bf16 (1 of 32 pictures)"),
        ("nvfp4", {"adherence": 0.8}, "the worst, nvfp4, 10.0 points fewer than bf16 (3 of 32 pictures)"),
        (
            "int8",
            {"adherence": 0.775, "lost": 5, "gained": 1},
            "the worst, int8, 12.5 points fewer than bf16 (4 of 32 pictures), "
            "5 lost and 1 gained; chance does that in 22 %",
        ),
        ("int8", {"lora": 0.94}, "the worst, int8, by 0.940"),
        ("nvfp4", {"lora_latents": 0.84}, "the worst, nvfp4, by 0.840"),
        ("svdq_int4_r32", {"latent_error": 0.09}, "the closest: svdq_int4_r32 0.0900, nvfp4 0.0800"),
        ("svdq_int4_r256", {"latent_error": 0.07}, "svdq_int4_r32 0.0600, svdq_int4_r256 0.0700"),
    ],
)
def test_what_does_not_hold_is_told_with_its_figures(name: str, changes: dict[str, float], says: str) -> None:
    rows = ROWS | {name: replace(ROWS[name], **changes)}

    broken = [said for said in findings([BF16, *rows.values()], 32) if not said.holds]

    assert [said.words for said in broken] == [says]


@pytest.mark.parametrize(
    ("lost", "gained", "expected"), [(0, 0, 1.0), (1, 0, 1.0), (3, 0, 0.25), (0, 6, 2 / 64), (5, 1, 14 / 64), (2, 2, 1)]
)
def test_chance_is_that_of_the_sign_test(lost: int, gained: int, expected: float) -> None:
    assert chance(lost, gained) == pytest.approx(expected)
    assert chance(gained, lost) == chance(lost, gained)


def test_fewer_points_lost_in_four_bits_than_five_are_fine() -> None:
    rows = ROWS | {"nvfp4": replace(ROWS["nvfp4"], adherence=0.86)}

    assert all(said.holds for said in findings([BF16, *rows.values()], 32))


def test_larger_svdquant_files_are_not_held_against_smaller_plain_ones() -> None:
    rows = [BF16, row("q4_0", 0.05, 40), row("svdq_fp4_r32", 0.09, 45)]

    assert not [said for said in findings(rows, 32) if "SVDQuant" in said.expected]


def test_nothing_is_said_of_what_was_not_measured() -> None:
    unscored = [replace(r, adherence=None, lora=None, lora_latents=None) for r in (BF16, ROWS["int8"])]
    broken = Row(name="nvfp4", file="", bytes=0, problem="no")

    assert findings([*unscored, broken], 32) == []

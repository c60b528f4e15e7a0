"""Launch options come from the table of the card's generation; nothing is searched while somebody waits."""

from __future__ import annotations

import json

import pytest

from shared.ops import tuning

TABLE = {
    "80": {"row": [[1024, {"num_warps": 4}], [None, {"num_warps": 8}]]},
    "90": {"row": [[None, {"num_warps": 16}]]},
}


@pytest.mark.parametrize(
    ("capability", "size", "warps"),
    [(80, 1024, 4), (80, 1025, 8), (89, 1, 4), (90, 1, 16), (120, 1, 16), (0, 1, 4)],
)
def test_the_newest_generation_that_is_not_newer_counts(capability: int, size: int, warps: int) -> None:
    assert tuning.launch("row", capability, size, TABLE) == {"num_warps": warps}


def test_options_may_be_changed_by_who_gets_them() -> None:
    tuning.launch("stretch", 90, 1).clear()

    assert tuning.launch("stretch", 90, 1)


def test_the_table_of_the_program_answers_for_every_generation_and_size() -> None:
    table = tuning.read()

    assert {"80", "86", "89", "90", "100", "120"} <= set(table)
    for name, kernels in table.items():
        wanted = {"row", "stretch", "map", "expand", "int8 matmul"} | ({"fp8 matmul"} if int(name) >= 89 else set())
        assert set(kernels) == wanted
        for kernel, entries in kernels.items():
            bounds = [bound for bound, _ in entries]
            assert bounds[-1] is None and bounds[:-1] == sorted(bounds[:-1]), (name, kernel)
    assert json.loads(tuning.FILE.read_text(encoding="utf-8"))["source"]

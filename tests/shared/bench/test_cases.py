"""Choosing cases and peers by name."""

from __future__ import annotations

import re

import pytest

from shared.bench.cases import CASES, PEERS, select_cases, select_peers, table
from shared.quant.errors import UserError


def ids(text: str) -> list[str]:
    return [case.id for case in select_cases(text)]


def test_patterns_and_lists_choose_in_the_tables_order() -> None:
    assert ids("c3,C1") == ["C1", "C3"]
    assert ids("B*") == [case.id for case in CASES if case.id.startswith("B")]
    assert ids("*") == [case.id for case in CASES]


def test_a_case_that_does_not_exist_names_the_closest() -> None:
    with pytest.raises(UserError) as caught:
        select_cases("C1,C33")

    assert "no case 'C33'" in caught.value.message
    assert "Did you mean C3?" in str(caught.value.hint)


def test_no_case_is_an_error() -> None:
    with pytest.raises(UserError, match="names no case"):
        select_cases(" , ")


def test_compiling_is_left_out_unless_asked_for() -> None:
    assert select_peers(None) == frozenset(PEERS) - {"P2"}
    assert select_peers("all") == frozenset(PEERS)
    assert select_peers("none") == frozenset()
    assert select_peers("p2, P1") == {"P1", "P2"}


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(UserError, match="no peer 'P9'"):
        select_peers("P1,P9")


def test_every_case_that_is_documented_is_there_once_and_tells_what_it_needs() -> None:
    expected = {f"B{i}" for i in range(11)} | {f"C{i}" for i in range(11)}

    assert {case.id for case in CASES} == expected
    assert len(CASES) == len(expected)
    assert all(case.needs_gpu == case.id.startswith("B") for case in CASES)
    assert {peer for case in CASES for peer in case.peers} == set(PEERS)
    assert all(re.search(rf"^{case.id}  .*needs a GPU$", table(), re.MULTILINE) for case in CASES if case.needs_gpu)

"""Checks that are made beside the work: once, in order, and what they find is never lost."""

from __future__ import annotations

import threading

import pytest

from shared.quant.errors import CheckpointError
from shared.quant.number_checks import NumberChecks


def damaged() -> None:
    raise CheckpointError("file: layer: a scale is NaN.", "Download it again.")


def test_each_check_is_made_once_in_order_and_let_go_of() -> None:
    made: list[int] = []
    checks = NumberChecks()
    for i in range(5):
        checks.add(lambda i=i: made.append(i))
    checks.start()
    checks.start()
    checks.finish()
    assert made == [0, 1, 2, 3, 4]
    assert checks.left == 0
    checks.finish()
    assert len(made) == 5


def test_what_is_found_is_raised_again_and_again() -> None:
    checks = NumberChecks()
    checks.add(damaged)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="a scale is NaN"):
            checks.finish()
    with pytest.raises(CheckpointError):
        checks.poll()


def test_polling_does_not_wait() -> None:
    go_on, begun = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        assert go_on.wait(30)
        damaged()

    checks = NumberChecks()
    checks.add(slow)
    checks.poll()  # nothing has begun
    checks.start()
    assert begun.wait(30)
    checks.poll()
    go_on.set()
    with pytest.raises(CheckpointError):
        checks.finish()


def test_work_beside_bad_numbers_does_not_end_well() -> None:
    checks = NumberChecks()
    checks.add(damaged)
    done = []
    with pytest.raises(CheckpointError), checks.beside():
        done.append("computed")
    assert done == ["computed"]

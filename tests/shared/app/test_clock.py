"""The time left, on a clock that the test turns."""

from __future__ import annotations

import time

import pytest

from shared.app.clock import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds."""
    told = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: told[0])
    return told


def test_the_first_picture_is_judged_by_its_steps_after_the_first(now: list[float]) -> None:
    clock = Clock(images=2, steps=4)

    now[0] = 30.0  # text, and warming up
    assert clock.step_done(1) is None
    now[0] = 32.0
    assert clock.step_done(2) == 2 * 2.0 + 4 * 2.0


def test_later_pictures_are_judged_by_whole_ones(now: list[float]) -> None:
    clock = Clock(images=3, steps=2)
    now[0] = 10.0
    clock.image_done()

    now[0] = 13.0
    assert clock.step_done(1) == 2 * 10.0 - 3.0


def test_a_picture_that_takes_longer_than_those_before_it_is_never_over_time(now: list[float]) -> None:
    clock = Clock(images=2, steps=2)
    now[0] = 10.0
    clock.image_done()

    now[0] = 50.0
    assert clock.step_done(2) == 0.0

"""The timeline of streamed blocks: bounds that hold for any machine, and cases worked out by hand."""

from __future__ import annotations

import random

import pytest

from shared.app.stream_schedule import Block, choose_resident, held_bytes, simulate

MB = 10**6


def test_copies_that_are_quicker_than_computing_are_hidden_but_for_the_very_first() -> None:
    blocks = [Block(100 * MB, 0.010)] * 5

    first, *later = simulate(blocks, 20e9)  # 5 ms each

    assert first.exposed_seconds == pytest.approx(0.005)
    assert all(step.exposed_seconds == pytest.approx(0) for step in later)
    assert all(step.seconds == pytest.approx(step.compute_seconds) for step in later)


def test_computing_that_is_quicker_than_copies_leaves_the_copy_time() -> None:
    blocks = [Block(100 * MB, 0.002)] * 5

    last = simulate(blocks, 20e9)[-1]

    assert last.seconds == pytest.approx(5 * 0.005)
    assert last.exposed_seconds == pytest.approx(5 * 0.003)


def test_one_buffer_hides_nothing() -> None:
    blocks = [Block(100 * MB, 0.010)] * 4

    last = simulate(blocks, 20e9, depth=1)[-1]

    assert last.exposed_seconds == pytest.approx(4 * 0.005)


def test_without_fetching_across_passes_each_begins_with_a_wait() -> None:
    blocks = [Block(100 * MB, 0.010)] * 5

    assert simulate(blocks, 20e9, wraps=False)[-1].exposed_seconds == pytest.approx(0.005)


def test_resident_blocks_are_not_copied_and_give_the_others_time() -> None:
    streamed = [Block(100 * MB, 0.003)] * 6
    half = [Block(100 * MB, 0.003, resident=stays) for stays in choose_resident([100 * MB] * 6, 500 * MB)]

    assert sum(block.resident for block in half) == 3
    assert simulate(half, 20e9)[-1].copied_bytes == 300 * MB
    assert simulate(streamed, 20e9)[-1].exposed_seconds == pytest.approx(6 * 0.002)
    assert simulate(half, 20e9)[-1].exposed_seconds == pytest.approx(0)


def test_a_pass_never_beats_its_computing_nor_its_copying() -> None:
    random.seed(0)
    for _ in range(100):
        blocks = [
            Block(random.randrange(1, 400) * MB, random.uniform(0.001, 0.02), random.random() < 0.4) for _ in range(12)
        ]
        for depth in (1, 2, 3):
            times = simulate(blocks, 25e9, depth=depth, passes=6)
            total = sum(step.seconds for step in times)
            assert total >= sum(step.compute_seconds for step in times) - 1e-9
            assert total >= sum(step.copied_bytes for step in times) / 25e9 - 1e-9
            assert all(s.seconds == pytest.approx(s.compute_seconds + s.exposed_seconds) for s in times)


def test_figures_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="depth"):
        simulate([], 25e9, depth=0)
    with pytest.raises(ValueError, match="copy_rate"):
        simulate([], 0)


@pytest.mark.parametrize("budget", range(0, 12))
def test_what_is_chosen_fits_the_budget_wherever_a_ring_does(budget: int) -> None:
    sizes = [1] * 10

    chosen = choose_resident(sizes, budget)

    assert held_bytes(sizes, chosen) <= max(budget, 2)
    assert sum(chosen) == (10 if budget >= 10 else max(0, budget - 2))


def test_resident_blocks_are_spread_over_the_pass() -> None:
    chosen = choose_resident([1] * 12, 6)

    assert [i for i, stays in enumerate(chosen) if stays] == [2, 5, 8, 11]


def test_the_ring_is_for_the_largest_streamed_block() -> None:
    assert held_bytes([5, 1, 1], [True, False, False]) == 7
    assert held_bytes([5, 1, 1], [False, True, True]) == 7
    assert held_bytes([5, 1, 1], [False, False, True]) == 11

"""Counts are exact: what is an operation, what a view, what the host waits for, how much memory is held at once."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from shared.bench.counters import count

A = torch.ones(100, 100)  # 40 000 bytes
BYTES = 40_000


def test_products_and_sums_are_operations_views_are_not() -> None:
    counts = count(lambda: ((A @ A).t()[:50] + 1).reshape(-1))

    assert counts.by_op == {"aten.mm": 1, "aten.add": 1, "aten._unsafe_view": 1} or counts.by_op == {
        "aten.mm": 1, "aten.add": 1, "aten.clone": 1,
    }  # fmt: skip
    assert counts.views >= 2


def test_bytes_moved_are_inputs_and_outputs() -> None:
    assert count(lambda: torch.add(A, A)).bytes_moved == 3 * BYTES


def test_scratch_is_the_most_that_is_held_at_one_moment() -> None:
    def work() -> None:
        first = A + 1
        second = first + 1
        del first
        third = second + 1
        del second, third

    assert count(work).scratch_bytes == 2 * BYTES


def test_what_was_there_before_is_not_scratch() -> None:
    held = torch.zeros(100, 100)

    assert count(lambda: held.add_(1)).scratch_bytes == 0


def test_working_in_place_is_an_operation() -> None:
    held = torch.zeros(100, 100)

    counts = count(lambda: held.mul_(2))

    assert (counts.ops, counts.views) == (1, 0)


def test_asking_a_fake_tensor_for_its_device_is_nothing() -> None:
    with FakeTensorMode():
        fake = torch.zeros(100, 100)

    assert count(lambda: fake.is_cpu and fake.device).gated() == dict.fromkeys(count(lambda: None).gated(), 0)


def test_everything_the_host_waits_for_is_seen() -> None:
    assert count(lambda: A.sum().item()).host_reads == 1
    assert count(lambda: bool((A > 0).all())).host_reads == 1
    assert count(lambda: A.nonzero()).host_reads == 1
    assert count(lambda: (A > 0).all()).host_reads == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_tensors_that_show_no_memory_are_counted_by_their_size() -> None:
    x = torch.ones(8, 8)

    counts = count(lambda: x.to_mkldnn() + x.to_mkldnn())

    assert counts.by_op["aten.add"] == 1
    assert counts.scratch_bytes == 3 * x.nbytes
    assert counts.views == 0

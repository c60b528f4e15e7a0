"""Garbage is looked for again when the work is done, if it was before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from shared.quant.collection import collection_put_off


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    was_enabled = gc.isenabled()
    yield
    gc.enable() if was_enabled else gc.disable()


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_within_and_then_all_is_as_before(enabled: bool) -> None:
    gc.enable() if enabled else gc.disable()

    with collection_put_off():
        assert not gc.isenabled()

    assert gc.isenabled() == enabled


def test_an_error_leaves_it_enabled() -> None:
    gc.enable()

    @collection_put_off()
    def fail() -> None:
        assert not gc.isenabled()
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            fail()
        assert gc.isenabled()

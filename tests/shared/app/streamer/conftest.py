"""A pretended GPU, and what the network computes without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.garbage import quick_collections
from tests.support.streamed_network import build, inputs


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """release() collects garbage; without this each time looks through all of torch."""
    with quick_collections():
        yield


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda(total_memory=8 << 30) as device:
        yield device


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return build()(inputs())

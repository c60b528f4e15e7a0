"""CPUs without compiled kernels: for tests that compare with a pretended GPU, which computes by torch, to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from shared import ops
from shared.ops import compiled_ready, eager


@contextlib.contextmanager
def only_torch() -> Iterator[None]:
    """As if numba were not installed."""
    with (
        mock.patch.object(ops, "_on_cpu", return_value=eager),
        mock.patch.object(compiled_ready, "why_not", return_value="turned off for this test"),
    ):
        yield

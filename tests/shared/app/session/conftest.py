"""A session with a family that draws without a network, and two presets."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.app.context import AppContext
from tests.support.fake_family import FakeHandler, fake_context, write_preset


@pytest.fixture
def handler() -> FakeHandler:
    return FakeHandler()


@pytest.fixture
def ctx(tmp_path: Path, handler: FakeHandler) -> AppContext:
    write_preset(tmp_path, "one")
    write_preset(tmp_path, "two")
    return fake_context(tmp_path, handler)

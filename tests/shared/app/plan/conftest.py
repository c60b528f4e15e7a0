"""The fake family with a preset that is here, and one whose transformer is to be downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.app.context import AppContext
from tests.support.fake_family import FakeHandler, fake_context, write_preset
from tests.support.fake_plans import REMOTE, SHAPES


@pytest.fixture
def ctx(tmp_path: Path) -> AppContext:
    write_preset(tmp_path, "one")
    write_preset(tmp_path, "remote", URLs=[REMOTE])
    return fake_context(tmp_path, FakeHandler())


@pytest.fixture
def sized(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> AppContext:
    """The preset "remote" says what its transformer weighs, and the family knows the shapes of one."""
    monkeypatch.setattr(FakeHandler, "query_published_shapes", lambda self, architecture: SHAPES, raising=False)
    write_preset(ctx.root, "remote", URLs=[REMOTE], gigabytes={"transformer": 2.0})
    ctx.refresh_presets()
    return ctx

"""A program folder for the doctor, who tries one packing's kernels only: each trial takes its time."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.app.context import AppContext
from shared.app.kernel_report import PROBES, kernel_choices
from tests.support.fake_family import FakeHandler, fake_context, write_preset


def doctors_context(root: Path, handler: FakeHandler, monkeypatch: pytest.MonkeyPatch) -> AppContext:
    monkeypatch.setattr(
        "shared.app.doctor.device_facts.kernel_choices",
        lambda *machine, **wish: kernel_choices(*machine, PROBES[:1], **wish),
    )
    write_preset(root, "z_image_demo", settings={"prompt": "a fox"})
    return fake_context(root, handler)

"""Drawing in a process of its own: what goes wrong there is told here."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from shared.app.context import default_root
from shared.app.drawing import DrawJob, draw_elsewhere
from shared.quant.errors import RunError, UserError


class Deadly:
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (7,)


def test_a_mistake_in_the_other_process_is_raised_here_with_its_hint() -> None:
    job = DrawJob(
        root=default_root(), args=argparse.Namespace(gpu="cpu"), preset="z_image_dem", file=Path("f"), pictures=()
    )

    with pytest.raises(UserError, match='no preset "z_image_dem"') as error:
        list(draw_elsewhere(job))

    assert "z_image_demo" in error.value.hint


def test_a_process_that_dies_is_an_error_and_no_endless_wait() -> None:
    job = DrawJob(root=default_root(), args=argparse.Namespace(), preset="", file=Path("f"), pictures=(Deadly(),))  # type: ignore[arg-type]

    with pytest.raises(RunError, match="ended with exit code 7"):
        list(draw_elsewhere(job))

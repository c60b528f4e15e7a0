"""The machine is asked for its device and number type, without torch where that is possible."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shared.app.context import AppContext
from shared.app.plan import find_machine, find_machine_quickly
from shared.quant.errors import UserError
from tests.support.fake_family import write_preset
from tests.support.fake_plans import CARD

PROGRAM = Path(__file__).parents[4]


def test_a_number_type_the_preset_demands_is_for_gpus(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    write_preset(ctx.root, "half", dtype="fp16")
    preset = ctx.refresh_presets().get("half")
    monkeypatch.setattr("shared.app.plan.machine.detect", lambda prefer: CARD.device)

    assert find_machine(preset).dtype.value == "float16"
    monkeypatch.undo()
    assert find_machine(preset, "cpu").dtype.value in ("float32", "bfloat16")


@pytest.mark.skipif(sys.platform != "linux", reason="the quick look reads Linux's own files")
def test_the_quick_look_at_the_machine_agrees_with_torch_and_does_without_it(ctx: AppContext) -> None:
    preset = ctx.presets.get("one")
    code = (
        "import sys; from types import SimpleNamespace; from shared.app.plan import find_machine_quickly\n"
        "machine = find_machine_quickly(SimpleNamespace(model_def={}), 'cpu')\n"
        "print(machine.device.kind, machine.dtype.value, 'torch' in sys.modules)"
    )

    quick = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM, capture_output=True, text=True, check=True)

    asked = find_machine(preset, "cpu")
    assert quick.stdout.split() == [asked.device.kind, asked.dtype.value, "False"]


def test_an_unknown_device_is_the_users_mistake(ctx: AppContext) -> None:
    with pytest.raises(UserError, match="tpu"):
        find_machine_quickly(ctx.presets.get("one"), "tpu")

"""Safer choices are remembered by what is in a weights file and by the device, and nothing else is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.app.choices import SaferChoices, identity
from shared.app.device import DeviceInfo
from shared.quant.errors import UserError
from tests.support.fake_family import write_weights

OLD = DeviceInfo("cuda", "RTX 2070", 75, 2**33, "")
NEW = DeviceInfo("cuda", "RTX 5090", 120, 2**35, "")


def test_a_choice_holds_for_the_same_bytes_on_the_same_device(tmp_path: Path) -> None:
    choices = SaferChoices(tmp_path / "settings" / "safer.json")
    weights = write_weights(tmp_path / "a.safetensors")
    moved = tmp_path / "elsewhere" / "b.safetensors"
    moved.parent.mkdir()
    moved.write_bytes(weights.read_bytes())

    choices.remember(weights, OLD, {"dtype": "too narrow"})
    choices.remember(weights, OLD, {"attention": "NaN"})

    assert choices.find(moved, OLD) == {"dtype": "too narrow", "attention": "NaN"}
    assert choices.find(weights, NEW) == {}
    assert choices.find(write_weights(tmp_path / "c.safetensors", shape=(3, 2)), OLD) == {}


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "safer.json"
    path.write_text("{")

    with pytest.raises(UserError, match=r"safer\.json, line 1"):
        SaferChoices(path).find(write_weights(tmp_path / "a.safetensors"), OLD)


def test_entries_of_another_form_are_passed_over(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "a.safetensors")
    path = tmp_path / "safer.json"
    path.write_text(json.dumps({f"{identity(weights)} cuda RTX 2070": ["attention"]}))

    assert SaferChoices(path).find(weights, OLD) == {}


def test_shards_count_together(tmp_path: Path) -> None:
    first = write_weights(tmp_path / "one.safetensors", "a")
    second = write_weights(tmp_path / "two.safetensors", "b")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": first.name, "b": second.name}}))
    before = identity(index)

    write_weights(second, "c")
    index.write_text(json.dumps({"weight_map": {"a": first.name, "c": second.name}}))

    assert identity(index) != before

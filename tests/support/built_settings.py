"""Settings built of a preset that is written for a test."""

import json
from pathlib import Path

from shared.app.families import load_families
from shared.app.presets import load_presets
from shared.app.settings import GenerationSettings

ROOT = Path(__file__).resolve().parents[2]


def make_preset(folder, model, **settings):
    model = {"name": "Test", "URLs": ["weights.safetensors"]} | model
    (folder / "test.json").write_text(json.dumps({"model": model, **settings}), encoding="utf-8")
    return load_presets([folder], load_families(ROOT / "models")).get("test")


def build(preset, saved=None, **overrides):
    return GenerationSettings.build(preset, saved or {}, overrides)

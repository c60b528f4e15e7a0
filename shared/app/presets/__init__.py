"""Presets: JSON files of defaults/ and finetunes/ made into checked `Preset`s, and the choice of their files.

A preset file's "model" part says which weights to use; every other top-level key is a default setting
(Wan2GP's schema, described in defaults/README.md). The file's stem is the preset's id. A later folder's file
with the same id is laid over the earlier one key by key, so finetunes/ overrides defaults/.

Rooms, from a file to a choice: layers.py (files as they are read), definitions.py (references between them),
building.py (a preset of its definition), collection.py (all of them), preset.py (what a preset is), choosing.py (which
of its alternative files is used), attention.py (its rule for attention).
"""

from shared.app.presets.attention import attention_rule
from shared.app.presets.choosing import QUANTIZATIONS, FilePlan, choose_files
from shared.app.presets.collection import PresetCollection, load_presets
from shared.app.presets.preset import GB, FileWant, LoraChoice, Preset, pair_loras

__all__ = [
    "GB",
    "QUANTIZATIONS",
    "FilePlan",
    "FileWant",
    "LoraChoice",
    "Preset",
    "PresetCollection",
    "attention_rule",
    "choose_files",
    "load_presets",
    "pair_loras",
]

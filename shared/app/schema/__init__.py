"""The keys that presets, settings files and `--set` may hold, their values, and how mistakes are told.

Checked by hand rather than by a validation library: the messages must name the file, the key and the closest
known key, and `wgp.py presets` must answer without importing anything large.

Rooms: kinds.py (what values may be), keys.py (the tables), checks.py (mistakes), json_files.py.
"""

from shared.app.schema.checks import (
    check_model_keys,
    check_setting_keys,
    closest_key,
    require_setting,
    unknown_key,
    wrong_value,
)
from shared.app.schema.json_files import describe, read_json_object
from shared.app.schema.keys import MODEL_KEYS, SETTING_KEYS, SETTINGS_VERSION, Key

__all__ = [
    "MODEL_KEYS",
    "SETTINGS_VERSION",
    "SETTING_KEYS",
    "Key",
    "check_model_keys",
    "check_setting_keys",
    "closest_key",
    "describe",
    "read_json_object",
    "require_setting",
    "unknown_key",
    "wrong_value",
]

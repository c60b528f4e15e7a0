"""Keys and values checked, and mistakes told with the file, the key and the closest known one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from shared.app.host_keys import HOST_MODEL_KEYS, HOST_SETTING_KEYS, RECORD_KEYS
from shared.app.schema.json_files import describe
from shared.app.schema.keys import MODEL_KEYS, SETTING_KEYS, WITHOUT_EFFECT, Key
from shared.app.schema.kinds import Kind
from shared.quant.errors import UserError

_SLIP = 0.85  # similarity from which an unknown key is taken for a misspelt known one
_LIKENESS = 0.6  # similarity from which a known key is worth naming


def check_model_keys(where: str, model: Mapping[str, Any]) -> list[str]:
    """Check a preset's "model" part; return notes on what has no effect. Raises UserError on a mistake."""
    notes = _check(where, model, MODEL_KEYS, HOST_MODEL_KEYS, "handed on to the model as it is")
    notes += [
        f'{where}: "{key}" is a setting; it has no effect inside "model" and belongs at the top level.'
        for key in model
        if key in SETTING_KEYS and key not in MODEL_KEYS and key not in HOST_MODEL_KEYS
    ]
    return notes + [
        f'{where}: "{key}" has no effect here: {WITHOUT_EFFECT[key]}.'
        for key, value in model.items()
        if key in WITHOUT_EFFECT and value
    ]


def check_setting_keys(where: str, settings: Mapping[str, Any]) -> list[str]:
    """Check a preset's settings; return notes on what has no effect. Raises UserError on a mistake."""
    foreign = HOST_SETTING_KEYS | RECORD_KEYS
    notes = _check(where, settings, SETTING_KEYS, foreign, "without effect")
    return notes + [
        f'{where}: "{key}" has no effect at the top level and belongs inside "model".'
        for key in settings
        if key in MODEL_KEYS and key not in SETTING_KEYS and key not in foreign
    ]


def require_setting(where: str, key: str, value: Any) -> Any:
    """`value` as the kind that `key` wants, read from text if need be. Raises UserError naming both kinds."""
    kind = SETTING_KEYS[key].kind
    if isinstance(value, str) and kind.from_text is not None:
        with suppress(ValueError, KeyError):  # the text stays, and the check below names it
            value = kind.from_text(value)
    if not kind.accepts(value):
        raise wrong_value(where, key, kind, value, SETTING_KEYS)
    return value


def unknown_key(where: str, key: str, known: Mapping[str, Any] | frozenset[str]) -> UserError:
    """Error for a key that is not known, naming the closest one."""
    closest = closest_key(key, known)
    hint = f'The closest known key is "{closest}".' if closest else "defaults/README.md lists the known keys."
    return UserError(f'{where}: there is no key "{key}".', hint)


def wrong_value(where: str, key: str, kind: Kind, value: Any, known: Mapping[str, Key]) -> UserError:
    """Error for a value of the wrong kind; names a similar key if the value would fit that one."""
    fitting = [name for name, other in known.items() if name != key and other.kind.accepts(value)]
    closest = closest_key(key, fitting)
    hint = f'The closest known key for such a value is "{closest}".' if closest else ""
    return UserError(f'{where}: "{key}" must be {kind.words}, got {describe(value)}.', hint)


def closest_key(key: str, known: Any, cutoff: float = _LIKENESS) -> str | None:
    """The known key most like `key`, ignoring case, "_" and "-"; None if none is like it."""
    by_plain = {_plain(name): name for name in known}
    found = difflib.get_close_matches(_plain(key), by_plain, n=1, cutoff=cutoff)
    return by_plain[found[0]] if found else None


def _check(
    where: str, values: Mapping[str, Any], known: Mapping[str, Key], foreign: frozenset[str], fate: str
) -> list[str]:
    """Notes on unknown keys. Keys of the other part are the caller's matter; "_..." are comments."""
    notes = []
    for key, value in values.items():
        if key in known:
            if value is not None and not known[key].kind.accepts(value):  # null means: not set
                raise wrong_value(where, key, known[key].kind, value, known)
        elif not (key in foreign or key in MODEL_KEYS or key in SETTING_KEYS or key.startswith("_")):
            everything = frozenset(known) | foreign
            slip = closest_key(key, everything, _SLIP)
            if slip is not None and not _is_on_purpose(key, slip):
                raise unknown_key(where, key, everything)
            closest = closest_key(key, everything)
            notes.append(
                f'{where}: unknown key "{key}", {fate}'
                + (f'; the closest known key is "{closest}".' if closest else ".")
            )
    return notes


def _is_on_purpose(key: str, known: str) -> bool:
    """A numbered sister ("URLs3") or a key switched off ("xURLs"), both usual in Wan2GP's files."""
    return re.sub(r"\d", "", key) == re.sub(r"\d", "", known) or key[1:] == known


def _plain(key: str) -> str:
    return re.sub(r"[_\-]", "", key).lower()

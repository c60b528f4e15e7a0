"""JSON objects read from files, and JSON values in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.quant.errors import UserError

_TYPE_NAMES = {dict: "object", list: "list", str: "text", bool: "truth value", int: "number", float: "number"}


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError naming file, line and column if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}).",
            "Correct the file, or move it away.",
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}).", "Save the file as UTF-8.") from error
    except RecursionError as error:
        raise UserError(f"{path}: its brackets are nested too deep.", "Correct the file, or move it away.") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise UserError(f"{path}: not usable JSON ({error}).", "Correct the file, or move it away.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object {{...}}, got {describe(value)}.")
    return value


def describe(value: Any) -> str:
    """A JSON value for an error message: what it is and what it says, shortened."""
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False, default=str)
    kind = _TYPE_NAMES.get(type(value), type(value).__name__)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"

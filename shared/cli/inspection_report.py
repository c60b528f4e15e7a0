"""The subcommand `inspect`: one file with all its facts, several files or folders with a line for each."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.quant.errors import CheckpointError

if TYPE_CHECKING:
    from shared.app.families import Families

DONE, BROKEN = 0, 1
_TEXT_WIDTH = 100


def inspect(args: argparse.Namespace, families: Families) -> int:
    """Say what weights files are, from headers alone; returns the exit code, 1 when a file that was named is none.

    A single file that cannot be read raises its CheckpointError; among several it is told in its line.
    """
    from shared.app.inspection import inspect_path, unreadable

    paths = [Path(name) for name in args.file]
    if len(paths) == 1 and not paths[0].is_dir():
        (found,) = inspect_path(paths[0], families.infos)
        print(json.dumps(found, indent=2) if args.json else inspection_text(found))
        return DONE
    described: list[dict[str, Any]] = []
    code = DONE
    for path in paths:
        try:
            described += inspect_path(path, families.infos)
        except CheckpointError as error:
            if len(paths) == 1:
                raise
            described.append(unreadable(path, error))
            code = BROKEN
    print(json.dumps(described, indent=2) if args.json else listing(described))
    return code


def inspection_text(description: Mapping[str, Any]) -> str:
    """One description of `inspect_path` for people: file and summary, then the facts."""
    facts = {key: value for key, value in description.items() if key not in ("file", "summary", "formats")}
    if len(facts.get("files", ())) == 1:
        del facts["files"]  # the file itself
    problems = facts.pop("problems", [])
    lines = [description["file"], f"  {description['summary']}", *_lines(facts, "  ")]
    # Their names are not ours to spell: GGUF Q8_0 keeps its underscore.
    formats = [f"    {name}: {count:,}" for name, count in description.get("formats", {}).items()]
    return "\n".join(
        [*lines, *(["  layers by format:", *formats] if formats else []), *_lines({"problems": problems}, "  ")]
    )


def listing(described: Sequence[Mapping[str, Any]]) -> str:
    """A line for each description: file, size, what it is, how many layers are kept how; then its problems."""
    names = [str(description["file"]) for description in described]
    sizes = [_size(description["bytes"]) if "bytes" in description else "" for description in described]
    widths = [max(map(len, column)) for column in (names, sizes)]
    lines = []
    for description, name, size in zip(described, names, sizes, strict=True):
        formats = sorted(description.get("formats", {}).items(), key=lambda pair: -pair[1])
        kept = ", ".join(f"{count} {name}" for name, count in formats)
        summary = description["summary"]
        inside = ", ".join(description.get("contains", ())[1:])
        words = (
            summary.removeprefix(f"{name}: ") + (f" with {inside}" if inside else "") + (f": {kept}" if kept else "")
        )
        lines.append(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {words}")
        label = "" if description["kind"] == "unreadable" else "problem: "
        problems = [said.removeprefix(summary).strip() for said in description["problems"]]
        lines += [f"  {label}{said}" for said in problems if said]
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _lines(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested values as indented "key: value" lines; empty ones are left out."""
    lines: list[str] = []
    for key, value in values.items():
        label = f"{indent}{str(key).replace('_', ' ')}:"
        if isinstance(value, Mapping) and value:
            lines += [label, *_lines(value, indent + "  ")]
        elif isinstance(value, (list, tuple)) and value:
            in_one = ", ".join(map(str, value))
            short = len(in_one) <= _TEXT_WIDTH
            lines += [f"{label} {in_one}"] if short else [label, *(f"{indent}  {item}" for item in value)]
        elif value not in (None, "", [], {}, ()):
            lines.append(f"{label} {value:,}" if type(value) is int else f"{label} {value}")
    return lines

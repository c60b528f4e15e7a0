"""The journal beside a file that is being written: a line of JSON for each group of tensors that is in it.

    OUT.part            what there is of the file so far
    OUT.part.journal    first line: what is being written; each further line: a group, its place and its checksum

A second run of the same work takes up after the last group that is whole: checksums say which ones reached the disk.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

_CHECKED_AT_ONCE = 2**24


def whole_lines(journal: Path, job: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Bytes of each line and what it says, the first line included, for as long as lines are whole.

    job: what the first line must say, as JSON gives it back; of another journal nothing is given.
    """
    for number, text in enumerate(journal.read_bytes().splitlines(keepends=True)):
        line = _parsed(text)
        if line is None or (number == 0 and line != job):
            return
        yield len(text), line


def as_json_gives_it_back(job: Mapping[str, Any]) -> dict[str, Any]:
    """The same job, comparable with a line that was read."""
    found: dict[str, Any] = json.loads(json.dumps(job))
    return found


def write_line(log: BinaryIO, line: Mapping[str, Any]) -> None:
    """Add a line and hand it to the system."""
    log.write(json.dumps(line).encode() + b"\n")
    log.flush()


def checksum(stream: BinaryIO, count: int) -> int | None:
    """Of the next `count` bytes; None when there are fewer."""
    found = 0
    while count:
        data = stream.read(min(count, _CHECKED_AT_ONCE))
        if not data:
            return None
        found, count = zlib.crc32(data, found), count - len(data)
    return found


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line; None for one that was cut off."""
    try:
        found = json.loads(text) if text.endswith(b"\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None

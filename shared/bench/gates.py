"""Counters that later runs must have exactly: a change of them is a change of what the program does, on every machine.

They depend on what torch makes of an operation, so each set names the torch it was counted with and binds only there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.bench.results import Record, Value

PATH = Path(__file__).parent / "gates.json"
CASE = "C7"


def problems(records: Sequence[Record], path: Path | None = None) -> list[str]:
    """What of the counters in these records is not as the gates have it, a line each; [] where nothing binds.

    Counters that the gates do not have yet are free. path: of the gates; None takes PATH.
    """
    path = path or PATH
    found: list[str] = []
    for record in records:
        if record.case != CASE or not path.exists():
            continue
        gates = json.loads(path.read_text(encoding="utf-8"))
        if gates["torch"] != release(record.versions.get("torch", "")):
            continue
        counted = rows_of(record)
        for row, expected in gates["rows"].items():
            have = counted.get(row, {})
            found += [
                f"{row}: {name} is {have.get(name, 'not counted')}, the gate says {figure}. "
                f"If that is meant: `python wgp.py bench --cases {CASE} --write-gates`."
                for name, figure in expected.items()
                if figure != have.get(name)
            ]
    return found


def write(records: Sequence[Record], path: Path | None = None) -> list[str]:
    """Take the counters of these records as the gates; a line for the user when there are none."""
    for record in records:
        if record.case == CASE:
            gates = {"torch": release(record.versions["torch"]), "rows": rows_of(record)}
            (path or PATH).write_text(json.dumps(gates, indent=1) + "\n", encoding="utf-8")
            return []
    return [f"--write-gates: this run counted nothing; add {CASE} to --cases."]


def rows_of(record: Record) -> dict[str, Mapping[str, Value]]:
    return {row.row: dict(row.values) for row in record.rows}


def release(version: str) -> str:
    """ "2.13.0+cpu" -> "2.13"."""
    return ".".join(version.split("+")[0].split(".")[:2])

"""Result files: one for a machine and a day, JSON, a record for each case. Everything shown is made from them.

    {"format": 1, "machine": {...},
     "cases": {"C3": {"date": "2026-11-21T15:40:00Z", "commit": "ec3696012", "command": "wgp.py bench --cases C3",
                      "how": "CPU time of one thread, least of the repeats", "versions": {...}, "before": {"load": 1.9},
                      "after": {...}, "notes": [],
                      "rows": [{"row": "bf16, 1024 tokens", "who": "ours", "values": {"ms": 846.2, "error": 0.0071}}]}}}

`ms` is the figure that counts, by the record's `how`; `ms_least`, `ms_median`, `ms_spread` (interquartile) and
`repeats` stand beside it. `error` is the relative L2 distance from the row's reference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared.bench.machine import Machine
from shared.quant.errors import UserError

FORMAT = 1
FOLDER = Path(__file__).parent / "results"

Value = float | int | str


@dataclass(frozen=True, slots=True)
class Row:
    """One contender's figures in one comparison. who: "ours", a peer's key, "raw" or ours by variant ("ours int8")."""

    row: str
    who: str
    values: Mapping[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of one case."""

    case: str
    date: str  # UTC, ISO 8601
    commit: str
    command: str
    how: str
    versions: Mapping[str, str]
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    rows: Sequence[Row] = ()
    finished: bool = True  # False of one that was cut short

    def find(self, row: str, who: str) -> Mapping[str, Value]:
        """The values of a row; {} when it was not measured."""
        return next((r.values for r in self.rows if r.row == row and r.who == who), {})

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        del found["case"]
        return found


@dataclass(frozen=True, slots=True)
class Results:
    """A result file's content. cases: by id."""

    machine: Machine
    cases: Mapping[str, Record]

    def as_dict(self) -> dict[str, Any]:
        cases = {case: self.cases[case].as_dict() for case in sorted(self.cases)}
        return {"format": FORMAT, "machine": self.machine.as_dict(), "cases": cases}


def default_path(machine: Machine, date: str, of: str = "") -> Path:
    """Where a run's results go unless said otherwise. date: ISO 8601, of which the day counts.

    of: the presets and caps that were asked for; others' results of the day are not to be replaced by these.
    """
    words = re.sub(r"[^a-z0-9.]+", "-", of.lower()).strip("-")
    return FOLDER / f"{machine.slug}_{date[:10]}{'_' if words else ''}{words}.json"


def read(path: Path) -> Results:
    """Raises UserError for a file that is not one of ours."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        if given["format"] != FORMAT:
            raise UserError(f"{path}: results of format {given['format']}; this version reads {FORMAT}.")
        machine = Machine(**given["machine"] | {"units": tuple(given["machine"].get("units", ()))})
        return Results(machine, {case: _record(case, fields) for case, fields in given["cases"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a result file of `wgp.py bench` ({type(error).__name__}: {error}).") from error


def merge(path: Path, machine: Machine, records: Sequence[Record]) -> Results:
    """Write records into a file, each in place of its case's earlier one; what else is in it stays.

    One that was cut short takes the place of a finished one only where it has more rows. No file is ever
    half-written.
    Raises UserError when the file is another machine's.
    """
    earlier = read_own(path, machine)
    cases = dict(earlier.cases)
    for record in records:
        known = cases.get(record.case)
        if record.finished or known is None or not known.finished or len(record.rows) > len(known.rows):
            cases[record.case] = record
    results = Results(machine, cases)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.new")
    written.write_text(json.dumps(results.as_dict(), indent=1) + "\n", encoding="utf-8")
    written.replace(path)
    return results


def read_own(path: Path, machine: Machine) -> Results:
    """What a file of this machine holds, nothing if there is none. Raises UserError when it is another machine's."""
    found = read(path) if path.exists() else Results(machine, {})
    if found.machine.slug != machine.slug:
        raise UserError(f"{path} holds figures of {found.machine}, this is {machine}.", "Give another file with --out.")
    return found


def read_all(folder: Path = FOLDER) -> list[Results]:
    """All result files of a folder, by name."""
    return [read(path) for path in sorted(folder.glob("*.json"))]


def _record(case: str, fields: Mapping[str, Any]) -> Record:
    rows = tuple(Row(row["row"], row["who"], row["values"]) for row in fields["rows"])
    return Record(case=case, **{**fields, "rows": rows, "notes": tuple(fields.get("notes", ()))})

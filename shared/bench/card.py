"""A record for people at a terminal: who took how long, how much of ours that is, how far off the result was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shared.bench.cases import CASES, PEERS
from shared.bench.results import Record, Row, Value

_TIMES = ("ms", "ms_least", "ms_median", "ms_spread", "repeats")


def card(record: Record) -> str:
    """Title, a block of lines for each comparison, notes."""
    what = next((case.what for case in CASES if case.id == record.case), "")
    lines = [f"{record.case}  {what}", f"    {record.how}; commit {record.commit or 'unknown'}"]
    for name in dict.fromkeys(row.row for row in record.rows):
        lines += _comparison(name, [row for row in record.rows if row.row == name])
    return "\n".join([*lines, *(f"    note: {note}" for note in record.notes), ""])


def _comparison(name: str, rows: Sequence[Row]) -> list[str]:
    if len(rows) == 1 and "ms" not in rows[0].values:
        return [f"  {name}: {_others(rows[0].values)}"]
    lines = [f"  {name}"]
    ours = next((row.values.get("ms") for row in rows if row.who.startswith("ours")), None)
    for row in rows:
        ms, error = row.values.get("ms"), row.values.get("error")
        cells = [f"    {label(row.who):<30}"]
        cells.append(f"{ms:>10.2f} ms ± {row.values.get('ms_spread', 0):<7.2f}" if isinstance(ms, (int, float)) else "")
        if len(rows) > 1 and isinstance(ms, (int, float)) and isinstance(ours, (int, float)) and ours:
            cells.append(f"{ms / ours:>6.2f} x")
        if error is not None:
            cells.append(f"  error {error}")
        lines.append("".join(cells) + f"   {_others(row.values)}".rstrip())
    return lines


def label(who: str) -> str:
    """ "P1" -> "diffusers, eager"; names of ours as they are."""
    key, _, rest = who.partition(" ")
    return f"{PEERS[key]} {rest}".strip() if key in PEERS else who


def _others(values: Mapping[str, Value]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if name not in (*_TIMES, "error"))

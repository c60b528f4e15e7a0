"""Goals held against results: what was reached, when, on what, and what is not measured yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shared.bench.card import label
from shared.bench.cases import CASES
from shared.bench.floors import Find
from shared.bench.goals import WORST, Check, Goal, Hardware
from shared.bench.machine import Machine
from shared.bench.results import Record, Results

_BY_PRESET = frozenset(case.id for case in CASES if case.by_preset)

# (machine, case) -> its newest record.
Newest = dict[tuple[str, str], tuple[Machine, Record]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """ours, peer: figures with units, "" if there are none. first: the earliest figure of the same machine.

    met: None while unmeasured.
    """

    goal: Goal
    ours: str = ""
    peer: str = ""
    first: str = ""
    met: bool | None = None
    record: Record | None = None
    machine: Machine | None = None


def judge(goal: Goal, results: Sequence[Results]) -> Verdict:
    """By the latest run that has the goal's figure."""
    if goal.check is None:
        return Verdict(goal=goal)
    check = goal.check
    newest = latest(results)
    runs = sorted(_runs(check, goal.hardware, results, newest), key=lambda run: run[1].date)
    if not runs:
        return Verdict(goal=goal)
    machine, record = runs[-1]
    value = _value(check, record, _finder(machine, newest))
    if value is None:  # it was tried, and failed
        outcome = str(record.find(check.row, check.who)["outcome"])
        return Verdict(goal=goal, ours=outcome, met=False, record=record, machine=machine)
    earliest = next(r for m, r in runs if m.slug == machine.slug)
    before = _value(check, earliest, _finder(machine, newest))
    is_first = earliest.date == record.date
    return Verdict(
        goal=goal,
        ours=_figure(value, check.unit) + _absolute(check, check.row, check.who, record),
        peer=_other(check, record, _finder(machine, newest)),
        first="" if before is None or is_first else _figure(before, check.unit),
        met=value <= check.bound if check.at_most else value >= check.bound,
        record=record,
        machine=machine,
    )


def current(results: Sequence[Results]) -> dict[tuple[str, str], list[tuple[Machine, Record]]]:
    """(machine, case) -> its newest record; of a case by presets the earlier ones, too, with what no newer one has."""
    found: dict[tuple[str, str], list[tuple[Machine, Record]]] = {}
    for result in results:
        for case, record in result.cases.items():
            found.setdefault((result.machine.slug, case), []).append((result.machine, record))
    for key, records in found.items():
        seen: set[tuple[str, str]] = set()
        kept: list[tuple[Machine, Record]] = []
        for machine, record in sorted(records, key=lambda known: known[1].date, reverse=True):
            rows = tuple(row for row in record.rows if (row.row, row.who) not in seen)
            seen |= {(row.row, row.who) for row in rows}
            if rows and (not kept or key[1] in _BY_PRESET):
                kept.append((machine, replace(record, rows=rows)))
        found[key] = kept
    return {key: records for key, records in found.items() if records}


def latest(results: Sequence[Results]) -> Newest:
    """(machine, case) -> its newest record, with the rows that only earlier ones have behind its own."""
    return {
        key: (records[0][0], replace(records[0][1], rows=tuple(row for _, record in records for row in record.rows)))
        for key, records in current(results).items()
    }


def _runs(
    check: Check,
    hardware: Hardware,
    results: Sequence[Results],
    newest: Newest,
) -> list[tuple[Machine, Record]]:
    """The runs that have the figure, or tell that there is none to be had."""
    if hardware == "CPU" or check.case.startswith("C"):
        fitting = list(results)
    else:
        fitting = [r for r in results if r.machine.gpu and (hardware == "GPU" or hardware in r.machine.gpu)]
    records = [(r.machine, r.cases[check.case]) for r in fitting if check.case in r.cases]
    return [
        (machine, record)
        for machine, record in records
        if _value(check, record, _finder(machine, newest)) is not None or "outcome" in record.find(check.row, check.who)
    ]


def _finder(machine: Machine, newest: Newest) -> Find:
    """Finds the newest record of a case on this machine."""

    def find(case: str) -> Record | None:
        found = newest.get((machine.slug, case))
        return found[1] if found else None

    return find


def _value(check: Check, record: Record, find: Find) -> float | None:
    ours = _number(check, record, check.row, check.who)
    if ours is None:
        return None
    if check.floor is not None:
        floor = check.floor.ms(find, record.find(check.row, check.who))
        if not ours or floor is None:
            return None
        return ours * check.scale / floor if check.inverse else 100 * floor / (ours * check.scale)
    if not check.versus:
        return ours * check.scale
    other = _number(check, record, check.versus_row or check.row, check.versus)
    if not ours or not other:
        return None
    return ours / other if check.inverse else other / ours


def _number(check: Check, record: Record, row: str, who: str) -> float | None:
    found = _numbers(check, record, who)
    if row == WORST:
        return found[_worst(check, found)] if found else None
    return found.get(row)


def _numbers(check: Check, record: Record, who: str) -> dict[str, float]:
    """By row, of all that have the figure."""
    keys = {check.key, check.per} if check.per else {check.key}
    rows = [row for row in record.rows if row.who == who and keys <= row.values.keys()]
    # The first of a name is the newest: see latest().
    return {
        row.row: float(row.values[check.key]) / (float(row.values[check.per]) if check.per else 1)
        for row in reversed(rows)
    }


def _worst(check: Check, found: Mapping[str, float]) -> str:
    """The row that is furthest from the goal."""
    return (max if check.at_most else min)(found, key=lambda row: found[row])


def _other(check: Check, record: Record, find: Find) -> str:
    """What ours is held against, in its own unit: a peer, or the floor by this machine's roofs."""
    if check.floor is not None:
        floor = check.floor.ms(find, record.find(check.row, check.who))
        return f"{_figure(floor or 0.0, 'ms')} by {check.floor.roofs}'s rates"
    if not check.versus:
        return ""
    return _absolute(check, check.versus_row or check.row, check.versus, record, named=True)


def _absolute(check: Check, row: str, who: str, record: Record, named: bool = False) -> str:
    """The figure behind a quotient, in its own unit."""
    if check.floor is not None:
        return f" ({_figure((_number(check, record, row, who) or 0.0) * check.scale, 'ms')})"
    if row == WORST:
        return f" ({_worst(check, _numbers(check, record, who))})"
    if not check.versus or check.per:
        return ""
    unit = {"ms": "ms", "seconds": "s", "cpu_seconds": "CPU s"}.get(check.key, check.key)
    figure = _figure(_number(check, record, row, who) or 0.0, unit)
    return f"{figure} {label(who)}" if named else f" ({figure})"


def _figure(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4
    return f"{value:,.{digits}f} {unit}".strip()

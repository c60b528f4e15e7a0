"""Goals held against results: what was reached, when, on what, and what is not measured yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.bench.card import label
from shared.bench.goals import Check, Goal, Hardware
from shared.bench.machine import Machine
from shared.bench.results import Record, Results


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
    runs = sorted(_runs(goal.check, goal.hardware, results), key=lambda run: run[1].date)
    if not runs:
        return Verdict(goal=goal)
    machine, record = runs[-1]
    check = goal.check
    value = _value(check, record)
    assert value is not None  # _runs keeps no others
    earliest = next(r for m, r in runs if m.slug == machine.slug)
    before = _value(check, earliest)
    is_first = earliest.date == record.date
    return Verdict(
        goal=goal,
        ours=_figure(value, check.unit) + _absolute(check, check.row, check.who, record),
        peer=_absolute(check, check.versus_row or check.row, check.versus, record, named=True) if check.versus else "",
        first="" if before is None or is_first else _figure(before, check.unit),
        met=value <= check.bound if check.at_most else value >= check.bound,
        record=record,
        machine=machine,
    )


def latest(results: Sequence[Results]) -> dict[tuple[str, str], tuple[Machine, Record]]:
    """(machine, case) -> its newest record."""
    found: dict[tuple[str, str], tuple[Machine, Record]] = {}
    for result in results:
        for case, record in result.cases.items():
            key = (result.machine.slug, case)
            if key not in found or record.date >= found[key][1].date:
                found[key] = (result.machine, record)
    return found


def _runs(check: Check, hardware: Hardware, results: Sequence[Results]) -> list[tuple[Machine, Record]]:
    if hardware == "CPU" or check.case.startswith("C"):
        fitting = list(results)
    else:
        fitting = [r for r in results if r.machine.gpu and (hardware == "GPU" or hardware in r.machine.gpu)]
    records = [(r.machine, r.cases[check.case]) for r in fitting if check.case in r.cases]
    return [(machine, record) for machine, record in records if _value(check, record) is not None]


def _value(check: Check, record: Record) -> float | None:
    ours = _number(check, record, check.row, check.who)
    if ours is None or not check.versus:
        return None if ours is None else ours * check.scale
    other = _number(check, record, check.versus_row or check.row, check.versus)
    if not ours or not other:
        return None
    return ours / other if check.inverse else other / ours


def _number(check: Check, record: Record, row: str, who: str) -> float | None:
    values = record.find(row, who)
    if check.key not in values or (check.per and check.per not in values):
        return None
    return float(values[check.key]) / (float(values[check.per]) if check.per else 1)


def _absolute(check: Check, row: str, who: str, record: Record, named: bool = False) -> str:
    """The figure behind a quotient, in its own unit."""
    if not check.versus or check.per:
        return ""
    unit = {"ms": "ms", "seconds": "s", "cpu_seconds": "CPU s"}.get(check.key, check.key)
    figure = _figure(_number(check, record, row, who) or 0.0, unit)
    return f"{figure} {label(who)}" if named else f" ({figure})"


def _figure(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4
    return f"{value:,.{digits}f} {unit}".strip()

"""The results page and its plots, made from the result files alone: docs/benchmarks.md, docs/images/bench_*.svg."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from shared.bench import charts, figures
from shared.bench.card import label
from shared.bench.cases import CASES, SESSIONS
from shared.bench.floors import best_rate
from shared.bench.goals import GOALS, Goal
from shared.bench.machine import Machine
from shared.bench.results import Record, Results, Row
from shared.bench.verdict import Verdict, current, judge, latest

PAGE = "docs/benchmarks.md"
_IMAGES = "docs/images/bench_{}.svg"

_HEAD = """\
# Benchmarks: goals, and what was measured

This page and its plots are written by `python wgp.py bench --render` from the files in `shared/bench/results/`, and
from nothing else; a test holds them against each other. `python wgp.py bench` lists the cases, `--cases C1` measures
one, `--cases "C*"` all that need no GPU.

How figures are taken: we and the peers in one process, on the same weights, in turns (A B C, C B A, ...), after
warm-ups. On a CPU one thread's CPU time, of which the least counts, because on a shared machine everything else
measures the neighbours; on a GPU the time between two CUDA events, of which the median counts. Weights are random and
of the real sizes: speed and memory do not depend on what they say. `error` is the relative L2 distance from the same
network in float32 (bf16 where a float32 copy would not fit), so every figure of speed stands beside what it costs.
Who fails, for want of memory or otherwise, has a row that says why under `outcome`.

A share of this machine's roofs is the time that the arithmetic would take at the rates measured on it (B0, on a CPU
C0), products and attention each at their own, over the time that was taken: a goal that holds where the rates are not
those that the goals in milliseconds were worked out with.
"""

_GOAL_TITLES = ("What", "Goal", "Floor", "Published", "Peer, same run", "Ours", "First", "Reached", "Measured")
_UNMEASURED = "Not measured yet"

# Who computes in bf16: nobody is below its floor, so a roof measured while others worked is no lower than these reach.
_IN_BF16 = ("ours", "P1", "P2")


def render(results: Sequence[Results], goals: Sequence[Goal] = GOALS, root: Path | None = None) -> dict[str, str]:
    """File name (from the program's folder) -> text, of the page and of every plot there are figures for.

    root: the program's folder, whose other texts get their figures, too; without it the page and plots alone.
    """
    verdicts = [judge(goal, results) for goal in goals]
    machines = _numbered([result.machine for result in results])
    images = dict(_plots(results))
    parts = [
        _HEAD,
        *_sessions(),
        *_machines(machines),
        *_goal_tables(verdicts, machines),
        *_open_goals(verdicts),
        *_pictures(images),
    ]
    parts += _cases(results, machines)
    found = {PAGE: "\n".join(parts).rstrip() + "\n", **{name: text for name, (_, text) in images.items()}}
    return found | (dict(figures.texts(root, results)) if root else {})


def _numbered(machines: Sequence[Machine]) -> dict[str, tuple[str, Machine]]:
    """Slug -> (M1, M2, ...; the machine)."""
    distinct = {machine.slug: machine for machine in machines}
    return {slug: (f"M{i}", distinct[slug]) for i, slug in enumerate(sorted(distinct), 1)}


def _sessions() -> Iterator[str]:
    """What to type where there is a GPU, the most valuable first."""
    yield (
        f"With a GPU, in order of value ({sum(s.minutes for s in SESSIONS):g} minutes in all on an H200, estimated; "
        "BIG is a folder with 45 GB to spare; every comparison is kept when it is made, so a run may be cut short):\n"
    )
    yield _row(("Command", "Minutes", "Tells"))
    yield _row(("---", "---:", "---"))
    for session in SESSIONS:
        yield _row((f"`{session.command}`", f"{session.minutes:g}", session.settles))
    yield ""


def _machines(machines: Mapping[str, tuple[str, Machine]]) -> Iterator[str]:
    for name, machine in machines.values():
        yield f"- **{name}**: {machine}"
    yield ""


def _goal_tables(verdicts: Sequence[Verdict], machines: Mapping[str, tuple[str, Machine]]) -> Iterator[str]:
    reached = sum(v.met is True for v in verdicts)
    measured = sum(v.met is not None for v in verdicts)
    yield "## Goals\n"
    yield (
        f"{len(verdicts)} goals, {measured} measured, {reached} of these reached. Floor: what arithmetic and the "
        "hardware's rates allow. Published: by others, on the hardware named. First: our earliest figure on the same "
        "machine, where there is a later one."
    )
    for section in dict.fromkeys(v.goal.section for v in verdicts):
        yield f"\n### {section}\n"
        yield _row(_GOAL_TITLES)
        yield _row(["---"] * len(_GOAL_TITLES))
        for v in (v for v in verdicts if v.goal.section == section):
            place = f"{v.record.date[:10]}, {machines[v.machine.slug][0]}" if v.record and v.machine else ""
            reached_cell = "" if v.met is None else "yes" if v.met else "no"
            known = (v.goal.metric, v.goal.goal, v.goal.floor, v.goal.peer)
            yield _row([*known, v.peer, v.ours, v.first, reached_cell, place])
    yield ""


def _open_goals(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """What is measured and not reached, and what is not measured."""
    for title, chosen in (
        ("Measured and not reached", [v for v in verdicts if v.met is False]),
        (_UNMEASURED, [v for v in verdicts if v.met is None]),
    ):
        yield f"### {title}\n"
        if not chosen:
            yield "Nothing.\n"
            continue
        for v in chosen:
            needs = {"H200": "an H200", "GPU": "a GPU", "CPU": "a CPU"}[v.goal.hardware]
            how = f"case {v.goal.check.case} on {needs}" if v.goal.check else f"needs {needs}; no case tells it yet"
            reason = f": {v.goal.reason}" if v.ours and v.goal.reason else ""
            yield f"- {v.goal.metric}: {v.goal.goal} ({v.ours or how}){reason}"
        yield ""


def _pictures(images: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    if images:
        yield "## Plots\n"
    for name, (caption, _) in images.items():
        yield f"![{caption}]({name.removeprefix('docs/')})\n"


def _cases(results: Sequence[Results], machines: Mapping[str, tuple[str, Machine]]) -> Iterator[str]:
    """Every case's newest record, all rows; below it earlier ones with other presets."""
    yield "## All figures\n"
    known = current(results)
    for case in CASES:
        for slug, name in sorted(known):
            for _, record in known[slug, name] if name == case.id else ():
                yield f"### {case.id} on {machines[slug][0]}: {case.what}\n"
                yield f"{case.shapes}. {record.how}. {record.date[:10]}, commit {record.commit}, {_versions(record)}.\n"
                yield from _rows(record)
                yield from (f"- {note}" for note in record.notes)
                yield f"\n`{record.command}`\n"


def _versions(record: Record) -> str:
    shown = ("python", "torch", "numba", "diffusers", "optimum-quanto", "comfy-kitchen", "mmgp")
    return ", ".join(f"{name} {record.versions[name]}" for name in shown if name in record.versions)


def _rows(record: Record) -> Iterator[str]:
    """A table with a column for every value that any row has."""
    keys = list(dict.fromkeys(key for row in record.rows for key in row.values))
    keys = [key for key in keys if key not in ("ms_least", "ms_median")]
    yield _row(["", "who", *keys])
    yield _row(["---", "---", *(["---:"] * len(keys))])
    before = ""
    for row in record.rows:
        yield _row([row.row if row.row != before else "", label(row.who), *(_cell(row, key) for key in keys)])
        before = row.row
    yield ""


def _cell(row: Row, key: str) -> str:
    value = row.values.get(key, "")
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _plots(results: Sequence[Results]) -> Iterator[Plot]:
    """(file, (caption, SVG)) of what there are figures for, from the newest records."""
    newest = latest(results)
    drawn: set[str] = set()
    for (slug, case), (machine, record) in sorted(newest.items()):
        for name, plot in _plots_of(case, record, machine, lambda case, slug=slug: newest.get((slug, case))):  # type: ignore[misc]
            yield _IMAGES.format(f"{name}_{slug}" if name in drawn else name), plot
            drawn.add(name)


Plot = tuple[str, tuple[str, str]]


def _plots_of(
    case: str, record: Record, machine: Machine, find: Callable[[str], tuple[Machine, Record] | None]
) -> Iterator[Plot]:
    """(short name, (caption, SVG)) of a case. find: another case of the same machine."""
    if case == "C3":
        roof = find("C0")
        yield from _block_plots(record, roof[1] if roof else None, machine)
    if case == "C4":
        yield from _program_plot(record, machine)
    if case == "B1":
        yield from _forward_plot(record, find("B0"), machine)
    if case == "B2":
        yield from _format_plot(record, machine)
    if case == "B6":
        yield from _vram_plot(record, machine)


def _block_plots(record: Record, roofs: Record | None, machine: Machine) -> Iterator[Plot]:
    where = f"one thread of {machine.cpu}"
    grown = [
        row for row in record.rows if row.row.startswith("growth, ") and {"ms", "tokens", "gflop"} <= row.values.keys()
    ]
    if grown:
        rate = 0.0 if roofs is None else max(_roof(roofs), *(_rate(r) for r in grown if r.who in _IN_BF16))
        yield "time", _time_plot(grown, rate, f"One block of real width, bf16 and int8, {where}")
    weights = {
        row.who.removeprefix("ours ").replace("ours", "bf16"): float(row.values["weight_bytes"]) / 1e6
        for row in record.rows
        if "weight_bytes" in row.values
    }
    if weights:
        title = "Weights of one block by variant (the network has 34)"
        yield "memory", (title, charts.bars(title, "MB", weights, unit="MB"))
    placed = {
        label(row.who): (float(row.values["ms"]), float(row.values["error"]))
        for row in record.rows
        if row.row in ("int8, 1024 tokens", "4-bit, 1024 tokens") and {"ms", "error"} <= row.values.keys()
    }
    if placed:
        title = f"Speed and error of one block, 1024 tokens, {where}"
        drawn = charts.points(title, "CPU ms", "relative error against float32", placed)
        yield "error", (title, drawn)


def _program_plot(record: Record, machine: Machine) -> Iterator[Plot]:
    """The most RAM that each model took, all of it and what was the program's own."""
    most: dict[str, float] = {}
    for row in record.rows:
        preset = row.row.partition(",")[0]
        for key, name in (("peak_rss_mb", preset), ("peak_own_mb", f"{preset}, own")):
            if key in row.values:
                most[name] = max(most.get(name, 0.0), float(row.values[key]) * 2**20 / 1e9)
    if most:
        title = f"RAM of the whole program at 256x256, one thread of {machine.cpu}"
        yield "ram", (title, charts.bars(title, "GB", most, unit="GB"))


def _forward_plot(record: Record, roofs: tuple[Machine, Record] | None, machine: Machine) -> Iterator[Plot]:
    rows = [
        row for row in record.rows if row.row.endswith("caption 100") and {"ms", "tokens", "gflop"} <= row.values.keys()
    ]
    if rows:
        rate = _roof(roofs[1]) if roofs else 0.0
        yield "forward", _time_plot(rows, rate, f"One forward in bf16, {machine.gpu}")


def _format_plot(record: Record, machine: Machine) -> Iterator[Plot]:
    """Every format's forward and its error; our bf16 once."""
    placed = {
        label(row.who): (float(row.values["ms"]), float(row.values["error"]))
        for row in record.rows
        if {"ms", "error"} <= row.values.keys() and float(row.values["error"]) > 0
    }
    if placed:
        title = f"Speed and error of a forward, 1024x1024, {machine.gpu}"
        yield "formats", (title, charts.points(title, "ms", "relative error against our bf16", placed))


def _vram_plot(record: Record, machine: Machine) -> Iterator[Plot]:
    most = {
        row.row.removesuffix(", 1024x1024"): float(row.values["peak_vram_mb"]) * 2**20 / 1e9
        for row in record.rows
        if row.row.endswith(", 1024x1024") and row.who == "ours" and "peak_vram_mb" in row.values
    }
    if most:
        title = f"GPU memory of the whole program at 1024x1024, {machine.gpu}"
        yield "vram", (title, charts.bars(title, "GB", most, unit="GB"))


def _time_plot(rows: Sequence[Row], rate: float, title: str) -> tuple[str, str]:
    """Time over tokens. rate: GFLOP per ms that the machine was seen to reach; 0 draws no floor."""
    series: dict[str, list[charts.Point]] = {}
    names = {}
    for row in rows:
        x = float(row.values["tokens"])
        series.setdefault(label(row.who), []).append((x, float(row.values["ms"])))
        names[x] = row.row.removeprefix("growth, ").partition(",")[0]
        if rate and row.who == "ours":
            series.setdefault("floor in bf16", []).append((x, float(row.values["gflop"]) / rate))
    return title, charts.lines(title, "picture", "ms", series, floor="floor in bf16", names=names)


def _roof(roofs: Record) -> float:
    """The highest rate of products in bf16, GFLOP per ms; 0 when none was taken."""
    return best_rate(roofs.rows, ("bf16",))


def _rate(row: Row) -> float:
    """GFLOP per ms."""
    return float(row.values["gflop"]) / float(row.values["ms"])

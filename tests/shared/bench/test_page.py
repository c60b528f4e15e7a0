"""Goals held against results, and the page and plots made of them; those that come with the program among them."""

from __future__ import annotations

import argparse
import shlex
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from shared.bench import charts
from shared.bench.card import label
from shared.bench.cases import CASES, PEERS, SESSIONS, select_cases, select_peers
from shared.bench.goals import GOALS, WORST, Check, Goal
from shared.bench.machine import Machine
from shared.bench.page import PAGE, render
from shared.bench.results import Record, Results, Row, read_all
from shared.bench.verdict import current, judge, latest
from shared.cli.bench import _caps, add_arguments, bench

PROGRAM = Path(__file__).parents[3]


def goal(check: Check | None, hardware: str = "CPU") -> Goal:
    return Goal(section="Speed", metric="a forward", goal="fast", hardware=hardware, check=check)  # type: ignore[arg-type]


def test_a_figure_is_held_against_its_bound(machine: Machine, record: Record) -> None:
    results = [Results(machine, {"C1": record})]

    slow = judge(goal(Check(case="C1", row="one forward", bound=3)), results)
    fast = judge(goal(Check(case="C1", row="one forward", bound=5)), results)

    assert (slow.met, slow.ours) == (False, "4 ms")
    assert fast.met is True


def test_a_ratio_is_the_peers_time_over_ours_with_both_shown(machine: Machine, record: Record) -> None:
    check = Check(case="C1", row="one forward", bound=3, versus="P1", at_most=False, unit="x")

    verdict = judge(goal(check), [Results(machine, {"C1": record})])

    assert (verdict.met, verdict.ours, verdict.peer) == (True, "3.50 x (4 ms)", "14 ms diffusers, eager")


def test_an_inverse_ratio_is_ours_over_the_others(machine: Machine, record: Record) -> None:
    check = Check(case="C1", row="one forward", bound=0.2, versus="P1", inverse=True, unit="x")

    verdict = judge(goal(check), [Results(machine, {"C1": record})])

    assert (verdict.met, verdict.ours) == (False, "0.29 x (4 ms)")


def test_of_many_rows_the_one_furthest_from_the_goal_counts_and_is_named(machine: Machine, record: Record) -> None:
    values = {"nf4": 30.0, "int8": 20.0}
    rows = [*(Row(name, "ours", {"ms": ms, "gb": 2}) for name, ms in values.items()), Row("bf16", "P1", {"ms": 90})]
    results = [Results(machine, {"C1": replace(record, rows=tuple(rows))})]

    most = judge(goal(Check(case="C1", row=WORST, bound=25)), results)
    least = judge(goal(Check(case="C1", row=WORST, bound=5, per="gb", at_most=False)), results)

    assert (most.met, most.ours) == (False, "30 ms (nf4)")
    assert (least.met, least.ours) == (True, "10 ms (int8)")
    assert judge(goal(Check(case="C1", row=WORST, bound=5, who="P3")), results).met is None


def test_the_latest_run_counts_and_the_first_is_shown_beside_it(machine: Machine, record: Record) -> None:
    better = tuple(Row(r.row, r.who, {**r.values, "ms": float(r.values["ms"]) / 2}) for r in record.rows)
    later = replace(record, date="2026-02-01T00:00:00Z", rows=better)
    files = [Results(machine, {"C1": later}), Results(machine, {"C1": record})]

    verdict = judge(goal(Check(case="C1", row="one forward", bound=3)), files)

    assert (verdict.ours, verdict.first, verdict.met) == ("2 ms", "4 ms", True)


@pytest.mark.parametrize(
    "check",
    [
        None,
        Check(case="C9", row="one forward", bound=1),
        Check(case="C1", row="another row", bound=1),
        Check(case="C1", row="one forward", bound=1, key="peak_mb"),
        Check(case="C1", row="one forward", bound=1, versus="P3"),
    ],
)
def test_what_was_not_measured_is_neither_reached_nor_missed(
    machine: Machine, record: Record, check: Check | None
) -> None:
    verdict = judge(goal(check), [Results(machine, {"C1": record})])

    assert (verdict.met, verdict.ours) == (None, "")


def test_a_goal_for_one_gpu_is_not_judged_by_another(machine: Machine, record: Record) -> None:
    on_gpu = replace(record, case="B1")
    check = Check(case="B1", row="one forward", bound=5)
    cards = {name: replace(machine, gpu=name) for name in ("NVIDIA H200", "NVIDIA A10")}

    verdicts = {
        (hardware, name): judge(goal(check, hardware), [Results(card, {"B1": on_gpu})]).met
        for hardware in ("H200", "GPU")
        for name, card in cards.items()
    }

    assert verdicts == {
        ("H200", "NVIDIA H200"): True, ("H200", "NVIDIA A10"): None,
        ("GPU", "NVIDIA H200"): True, ("GPU", "NVIDIA A10"): True,
    }  # fmt: skip


def drawn(preset: str, seconds: float, date: str, record: Record) -> Record:
    rows = (Row(f"{preset}, no cap", "ours", {"denoise_seconds": seconds, "forwards": 8}),)
    return replace(record, case="B5", date=date, rows=rows)


def test_a_run_of_other_presets_leaves_what_was_measured(machine: Machine, record: Record) -> None:
    card = replace(machine, gpu="NVIDIA H200")
    days = [
        drawn("z_image", 1.0, "2026-01-01", record), drawn("demo", 2.0, "2026-01-02", record),
        drawn("demo", 3.0, "2026-01-03", record),
    ]  # fmt: skip
    files = [Results(card, {"B5": day}) for day in days]

    shown = current(files)[card.slug, "B5"]
    whole = latest(files)[card.slug, "B5"][1]

    assert [(found.date, found.rows[0].row) for _, found in shown] == [
        ("2026-01-03", "demo, no cap"), ("2026-01-01", "z_image, no cap"),
    ]  # fmt: skip
    assert [row.values["denoise_seconds"] for row in whole.rows] == [3.0, 1.0]
    assert render(files)[PAGE].count("### B5 on M1") == 2


def test_of_other_cases_the_newest_run_counts_alone(machine: Machine, record: Record) -> None:
    renamed = replace(record, date="2026-02-01", rows=(Row("another row", "ours", {"ms": 1.0}),))

    found = latest([Results(machine, {"C1": record}), Results(machine, {"C1": renamed})])

    assert [row.row for row in found[machine.slug, "C1"][1].rows] == ["another row"]


def test_commands_for_a_gpu_are_such_as_can_be_typed_and_leave_no_case_out() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--ckpts")
    chosen: list[str] = []

    for session in SESSIONS:
        words = shlex.split(session.command)
        if words[1:3] != ["wgp.py", "bench"]:
            continue
        args = parser.parse_args(words[3:])
        select_peers(args.peers)
        assert _caps(args.caps)
        chosen += [case.id for case in select_cases(args.cases)]

    assert set(chosen) == {case.id for case in CASES if case.needs_gpu}
    assert all(f"`{session.command}`" in render([])[PAGE] for session in SESSIONS)


def test_the_page_lists_what_is_missing_and_what_fell_short(machine: Machine, record: Record) -> None:
    goals = [
        goal(Check(case="C1", row="one forward", bound=3)),
        replace(goal(Check(case="B1", row="one forward", bound=3), "H200"), metric="on a large GPU"),
        replace(goal(None, "GPU"), metric="by nobody"),
        replace(goal(Check(case="C1", row="one forward", bound=2)), metric="twice", reason="for a reason"),
    ]

    text = render([Results(machine, {"C1": record})], goals)[PAGE]

    assert "4 goals, 2 measured, 0 of these reached" in text
    assert "- twice: fast (4 ms): for a reason" in text
    assert "- a forward: fast (4 ms)" in text
    assert "- on a large GPU: fast (case B1 on an H200)" in text
    assert "- by nobody: fast (needs a GPU; no case tells it yet)" in text
    assert "| a forward | fast |  |  |  | 4 ms |  | no | 2026-01-02, M1 |" in text
    assert "- **M1**: 4 cores of Some CPU, 16 GB" in text
    assert "- A note." in text


def test_without_results_the_page_is_a_list_of_what_is_to_be_measured() -> None:
    files = render([])

    assert list(files) == [PAGE]
    assert f"{len(GOALS)} goals, 0 measured" in files[PAGE]


def test_the_page_in_the_docs_is_what_the_results_render_to() -> None:
    for name, text in render(read_all(), root=PROGRAM).items():
        assert (PROGRAM / name).read_text(encoding="utf-8") == text, f"{name}: run `python wgp.py bench --render`"


def test_every_plot_in_the_docs_is_rendered() -> None:
    rendered = set(render(read_all()))

    found = {path.relative_to(PROGRAM).as_posix() for path in (PROGRAM / "docs" / "images").glob("bench_*")}
    assert found == rendered - {PAGE}


def test_plots_are_readable_and_name_everything_they_show() -> None:
    drawn = {
        "lines": charts.lines(
            "T & Co",
            "x",
            "y",
            {"ours": [(1, 2), (2, 3)], "floor": [(1, 1), (2, 2)]},
            floor="floor",
            names={1: "256x256"},
        ),
        "bars": charts.bars("T & Co", "y", {"ours": 3.0, "256x256": 4.0, "floor": 5.0}, unit="MB"),
        "points": charts.points("T & Co", "x", "y", {"ours": (10, 0.01), "256x256": (20, 0.1), "floor": (5, 0.5)}),
    }

    for text in drawn.values():
        words = [element.text for element in ET.fromstring(text).iter() if element.text]
        assert {"T & Co", "ours", "floor", "256x256"} <= set(words)


def test_every_peers_name_has_room_beside_a_plot() -> None:
    per_letter = 6.3  # of 12 pixel high letters, on average, in the fonts that system-ui stands for

    text = charts.points("T", "x", "y", {label(peer): (10, 0.01) for peer in PEERS})

    for word in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text"):
        if word.text in {label(peer) for peer in PEERS}:
            assert float(word.attrib["x"]) + per_letter * len(word.text) < 940


def test_large_numbers_are_written_out() -> None:
    text = charts.lines("T", "x", "y", {"ours": [(1.0, 9000.0), (2.0, 10000.0)]}, names={})

    assert "10,000" in text and "e+" not in text


def plotted(machine: Machine, *records: Record) -> dict[str, str]:
    return render([Results(machine, {record.case: record for record in records})], [])


def test_time_is_drawn_over_resolution_and_nothing_in_bf16_below_its_floor(machine: Machine, record: Record) -> None:
    grown = tuple(
        Row(f"growth, {side}x{side}", who, {"ms": ms * share, "tokens": tokens, "gflop": tokens / 2})
        for side, tokens, ms in ((512, 1152, 1000), (1024, 4224, 4000))
        for who, share in (("ours", 1), ("P1", 2))
    )
    busy = replace(record, case="C0", rows=(Row("512 x 512", "raw bf16", {"ms": 10.0, "gflop": 0.1}),))

    text = plotted(machine, replace(record, case="C3", rows=grown), busy)["docs/images/bench_time.svg"]

    svg = "{http://www.w3.org/2000/svg}"
    lines = {
        line.get("stroke-dasharray", line.attrib["stroke"]): line for line in ET.fromstring(text).iter(f"{svg}polyline")
    }
    floor, ours, *_ = [  # from the top of the picture
        [float(point.split(",")[1]) for point in line.attrib["points"].split()]
        for line in sorted(lines.values(), key=lambda line: not line.get("stroke-dasharray"))
    ]
    assert {"512x512", "1024x1024", "floor in bf16", "diffusers, eager"} <= set(ET.fromstring(text).itertext())
    assert all(low >= high - 0.1 for low, high in zip(floor, ours, strict=True)), "lower is further from the top"


def test_memory_of_the_whole_program_is_drawn_with_its_own_share(machine: Machine, record: Record) -> None:
    rows = (Row("z_image_int8, 256x256, 2 forwards", "ours", {"peak_rss_mb": 7859.0, "peak_own_mb": 4455.0}),)

    text = plotted(machine, replace(record, case="C4", rows=rows))["docs/images/bench_ram.svg"]

    assert {"z_image_int8", "8.24 GB", "z_image_int8, own", "4.67 GB"} <= set(ET.fromstring(text).itertext())


def test_plots_of_a_gpu_are_its_own_beside_those_of_a_cpu(machine: Machine, record: Record) -> None:
    card = replace(machine, gpu="NVIDIA H200")
    formats = tuple(
        Row(f"{kind}, 1024x1024", who, {"ms": ms, "error": error})
        for kind in ("int8", "nvfp4")
        for who, ms, error in ((f"ours {kind}", 50.0, 0.01), ("ours bf16", 80.0, 0.0))
    )
    memory = tuple(
        Row(f"{preset}, {side}", "ours", {"peak_vram_mb": mib})
        for preset, side, mib in (("z_image", "1024x1024", 12000.0), ("z_image_int8", "1024x1024", 6000.0),
                                  ("z_image_int8", "2048x2048", 7000.0))
    )  # fmt: skip
    forward = tuple(
        Row(f"{side}x{side}, caption 100", "ours", {"ms": ms, "tokens": tokens, "gflop": 100.0 * ms})
        for side, ms, tokens in ((512, 18.0, 1152), (1024, 80.0, 4224))
    )
    roofs = (Row("1152 x 64 x 64", "raw bf16", {"ms": 1.0, "gflop": 790.0}),)
    rows = {"B0": roofs, "B1": forward, "B2": formats, "B6": memory}

    files = plotted(card, *(replace(record, case=case, rows=found) for case, found in rows.items()))

    words = {name: set(ET.fromstring(text).itertext()) for name, text in files.items() if name != PAGE}
    assert {"512x512", "1024x1024", "floor in bf16", "ours"} <= words["docs/images/bench_forward.svg"]
    assert {"ours int8", "ours nvfp4"} <= words["docs/images/bench_formats.svg"]
    assert {"z_image", "12.6 GB", "z_image_int8", "6.29 GB"} <= words["docs/images/bench_vram.svg"]


def test_a_second_machines_plots_do_not_replace_the_firsts(machine: Machine, record: Record) -> None:
    rows = (Row("z_image, 256x256, 2 forwards", "ours", {"peak_rss_mb": 7859.0}),)
    known = {"C4": replace(record, case="C4", rows=rows)}

    names = set(render([Results(machine, known), Results(replace(machine, cpu="Another"), known)], [])) - {PAGE}

    assert names == {"docs/images/bench_ram.svg", "docs/images/bench_ram_some-cpu-4-cores.svg"}


def test_the_floor_is_dashed() -> None:
    series = {"ours": [(1.0, 2.0), (2.0, 3.0)], "floor": [(1.0, 1.0), (2.0, 2.0)]}

    text = charts.lines("T", "x", "y", series, floor="floor", names={})

    assert text.count("stroke-dasharray") == 1


def test_lower_values_are_drawn_lower() -> None:
    text = charts.bars("T", "y", {"small": 1.0, "large": 4.0}, unit="MB")

    bars = [e for e in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}rect") if e.get("x")]
    small, large = (float(bar.attrib["height"]) for bar in bars)
    assert large == pytest.approx(4 * small, rel=0.01)


def test_render_writes_every_file(tmp_path: Path) -> None:
    from argparse import Namespace
    from types import SimpleNamespace

    assert bench(SimpleNamespace(root=tmp_path), Namespace(render=True)) == 0  # type: ignore[arg-type]

    assert (tmp_path / PAGE).read_text(encoding="utf-8") == render(read_all())[PAGE]

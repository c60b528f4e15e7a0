"""Figures in texts: what a query stands for, and that the program's own texts have theirs from the results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shared.bench.figures import figure, fill, texts
from shared.bench.machine import Machine
from shared.bench.results import Record, Results, Row, read_all
from shared.quant.errors import UserError

PROGRAM = Path(__file__).parents[3]


@pytest.fixture
def results(machine: Machine, record: Record) -> list[Results]:
    return [Results(machine, {"C1": record})]


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("C1; one forward; ours; ms; .1f", "4.0"),
        ("C1; one forward; P1 / ours; ms; .2f", "3.50"),
        ("C1; one forward; ours / one forward: P1; ms; .2f", "0.29"),
        ("C1; one forward; P1; ms * 1000; ,.0f", "14,000"),
    ],
)
def test_a_query_is_a_value_a_quotient_or_a_value_in_another_unit(
    results: list[Results], query: str, text: str
) -> None:
    assert figure(query, results, "page.md") == text


def test_a_figure_in_a_text_is_written_anew_and_the_rest_stays(results: list[Results]) -> None:
    marker = "<!-- figure C1; one forward; ours; ms; .0f -->"

    assert fill(f"It took {marker}99<!-- end --> ms.", results, "page.md") == f"It took {marker}4<!-- end --> ms."


def test_the_newest_record_of_the_machine_that_was_measured_most_counts(machine: Machine, record: Record) -> None:
    later = replace(record, date="2027-01-01T00:00:00Z", rows=(Row("one forward", "ours", {"ms": 3.0}),))
    elsewhere = replace(later, date="2028-01-01T00:00:00Z", rows=(Row("one forward", "ours", {"ms": 1.0}),))
    given = [
        Results(machine, {"C1": record, "C2": record}), Results(machine, {"C1": later}),
        Results(replace(machine, cpu="Another"), {"C1": elsewhere}),
    ]  # fmt: skip

    assert figure("C1; one forward; ours; ms; .0f", given, "page.md") == "3"
    assert figure("C1; one forward; P1; ms; .0f", given, "page.md") == "14", "which the later run left out"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("C1; one forward; ours; gb; .0f", "page.md: no result file has the gb of ours in C1's 'one forward'"),
        ("C9; one forward; ours; ms; .0f", "no result file has the ms of ours in C9's"),
        ("C1; ours; ms", "is not case; row; who; key; format"),
    ],
)
def test_a_figure_that_is_not_there_names_the_text(results: list[Results], query: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        figure(query, results, "page.md")


def test_texts_that_speak_of_speed_have_their_figures_from_the_results() -> None:
    marked = dict(texts(PROGRAM, read_all()))

    assert {"README.md", "docs/speed.md", "docs/compute.md", "docs/loading.md", "docs/memory.md"} <= set(marked)


def test_no_line_begins_with_a_figure() -> None:
    """Markdown would take it for the beginning of raw HTML and end the paragraph."""
    for name, text in texts(PROGRAM, read_all()):
        assert [line for line in text.splitlines() if line.lstrip().startswith("<!-- figure")] == [], name

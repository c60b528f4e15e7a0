"""Figures in the middle of texts, written there from the results.

    A block takes <!-- figure C3; int8, 1024 tokens; ours int8 / P1; ms; .2f -->0.53<!-- end --> of diffusers' time.

Case; row; who (or who / another, or who / row: who for another row's); the value's key, times a number if one follows;
how Python formats it. A reader of the page sees the figure alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared.bench.results import Record, Results
from shared.quant.errors import UserError

_MARKED = re.compile(r"(<!-- figure (?P<query>[^>]+?) -->)(?P<text>.*?)(<!-- end -->)", re.DOTALL)
# Texts that may have some, from the program's folder.
_TEXTS = ("README.md", "docs/*.md", "models/*/README.md")


def texts(root: Path, results: Sequence[Results]) -> Iterator[tuple[str, str]]:
    """(file name, text with its figures as they are now) of every text that has any."""
    for pattern in _TEXTS:
        for path in sorted(root.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            if _MARKED.search(text):
                yield path.relative_to(root).as_posix(), fill(text, results, path.name)


def fill(text: str, results: Sequence[Results], name: str) -> str:
    """The text with every marked figure written anew. Raises UserError, naming the text, for one that is not there."""

    def written(found: re.Match[str]) -> str:
        return f"{found[1]}{figure(found['query'], results, name)}{found[4]}"

    return _MARKED.sub(written, text)


def figure(query: str, results: Sequence[Results], name: str) -> str:
    """What a query stands for."""
    parts = [part.strip() for part in query.split(";")]
    if len(parts) != 5:
        raise UserError(f"{name}: the figure {query!r} is not case; row; who; key; format.")
    case, row, whos, key, spec = parts
    key, _, factor = key.partition(" * ")
    who, _, other = whos.partition(" / ")
    value = _value(case, row, who, key, results, name) * float(factor or 1)
    if other:
        other_row, _, other_who = other.rpartition(": ")
        value /= _value(case, other_row or row, other_who, key, results, name)
    return format(value, spec)


def _value(case: str, row: str, who: str, key: str, results: Sequence[Results], name: str) -> float:
    for record in _newest_first(case, results):
        found = record.find(row, who).get(key)
        if found is not None:
            return float(found)
    raise UserError(
        f"{name}: no result file has the {key} of {who} in {case}'s {row!r}.",
        f"Measure it (wgp.py bench --cases {case}), or take the figure out.",
    )


def _newest_first(case: str, results: Sequence[Results]) -> list[Record]:
    """Of the machine that was measured most: texts speak of one."""
    measured: dict[str, set[str]] = {}
    for result in results:
        measured.setdefault(result.machine.slug, set()).update(result.cases)
    best = max(sorted(measured), key=lambda slug: len(measured[slug]), default="")
    records = [r.cases[case] for r in results if r.machine.slug == best and case in r.cases]
    return sorted(records, key=lambda record: record.date, reverse=True)

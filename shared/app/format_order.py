"""What a comparison of formats is expected to show, and whether it does: each expectation with the figures behind it.

    8 bits        adherence within 1 point of the reference, LoRA changes correlated by 0.95 and more
    4, 5 bits     adherence within 5 points, LoRA changes correlated by 0.85 and more
    SVDQuant      nearer to the reference than every plain 4-bit file that is no smaller
    ranks         the higher one is nearer

Nearer is measured in the final latents. One picture of 32 is 3 points of adherence, so the words count pictures too:
how many the reference alone keeps, how many the format alone, and how often chance deals such a hand. A scorer draws a
line somewhere, and small differences push pictures over it both ways; if they did so like a coin, k or fewer of n on
one side would come up with the probability 2 * sum(n over i, i = 0..k) / 2^n (the sign test, McNemar's exact test).
3 lost and none gained: 2 / 8 = 25 %. 6 and none: 3 %, which is hard to call chance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.app.compare import Row

_EIGHT = re.compile(r"int8.*|fp8.*|mxfp8.*|q8_0")
_FOUR = re.compile(r"nvfp4.*|q[45]_[01]|svdq_.*")
_PLAIN_FOUR = ("nvfp4", "q4_0", "q4_1")
_SVDQ = re.compile(r"(?P<kind>svdq_\w+?)_r(?P<rank>\d+)")

# Points of adherence that a format may lose, and the least correlation of what a LoRA changes.
MOST_LOST = {8: 0.01, 4: 0.05}
LEAST_ALIKE = {8: 0.95, 4: 0.85}


@dataclass(frozen=True)
class Finding:
    """Whether what was expected is so. words: the figures, of the worst format where several are meant."""

    expected: str
    holds: bool
    words: str


def findings(rows: Sequence[Row], pictures: int) -> list[Finding]:
    """Every expectation that these rows can say something about. rows: the reference first; pictures: of each."""
    reference, *others = [row for row in rows if not row.problem]
    found: list[Finding] = []
    for bits, pattern in ((8, _EIGHT), (4, _FOUR)):
        named = f"{bits} bits" if bits == 8 else "4 and 5 bits"
        packed = [row for row in others if pattern.fullmatch(row.name)]
        found += _adherence(reference, packed, named, MOST_LOST[bits], pictures)
        found += _lora(packed, named, LEAST_ALIKE[bits])
    return [*found, *_against_plain(others), *_by_rank(others)]


def _adherence(reference: Row, rows: Sequence[Row], named: str, most: float, pictures: int) -> Iterator[Finding]:
    scored = [(reference.adherence - row.adherence, row) for row in rows
              if row.adherence is not None and reference.adherence is not None]  # fmt: skip
    if not scored:
        return
    lost, worst = max(scored, key=lambda pair: pair[0])
    words = f"the worst, {worst.name}, {_points(lost, reference.name, pictures)}{_chance_words(worst)}"
    points = "1 point" if most == 0.01 else f"{100 * most:.0f} points"
    yield Finding(f"{named} keep the prompt within {points}", lost <= most + 1e-9, words)


def chance(lost: int, gained: int) -> float:
    """How often coins would fall as unevenly as `lost` pictures to `gained`, or more so: 0 to 1, two-sided."""
    tosses = lost + gained
    tail = sum(math.comb(tosses, heads) for heads in range(min(lost, gained) + 1))
    return min(1.0, math.ldexp(tail, 1 - tosses))


def _chance_words(row: Row) -> str:
    if not row.lost + row.gained:
        return ""
    return f", {row.lost} lost and {row.gained} gained; chance does that in {100 * chance(row.lost, row.gained):.0f} %"


def _lora(rows: Sequence[Row], named: str, least: float) -> Iterator[Finding]:
    for where, values in (
        ("the picture", [(row.lora, row.name) for row in rows if row.lora is not None]),
        ("the latents", [(row.lora_latents, row.name) for row in rows if row.lora_latents is not None]),
    ):
        if values:
            alike, name = min(values)
            words = f"the worst, {name}, by {alike:.3f}"
            yield Finding(f"{named} change {where} with a LoRA alike, by {least} and more", alike >= least, words)


def _against_plain(rows: Sequence[Row]) -> Iterator[Finding]:
    plain = [row for row in rows if row.name in _PLAIN_FOUR]
    pairs = [
        (other.latent_error / row.latent_error, row, other)
        for row in rows
        for other in plain
        if _SVDQ.fullmatch(row.name) and row.bytes <= other.bytes and row.latent_error
    ]
    if not pairs:
        return
    ratio, row, other = min(pairs, key=lambda pair: pair[0])
    words = f"the closest: {row.name} {row.latent_error:.4f}, {other.name} {other.latent_error:.4f}"
    yield Finding("SVDQuant is nearer than plain 4-bit files that are no smaller", ratio >= 1, words)


def _by_rank(rows: Sequence[Row]) -> Iterator[Finding]:
    ranked: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        if match := _SVDQ.fullmatch(row.name):
            ranked.setdefault(match["kind"], []).append((int(match["rank"]), row))
    for kind, found in ranked.items():
        in_order = [row for _, row in sorted(found, key=lambda pair: pair[0])]
        if len(in_order) > 1:
            holds = all(low.latent_error >= high.latent_error for low, high in pairwise(in_order))
            words = ", ".join(f"{row.name} {row.latent_error:.4f}" for row in in_order)
            yield Finding(f"a higher rank of {kind} is nearer", holds, words)


def _points(lost: float, reference: str, pictures: int) -> str:
    count = round(abs(lost) * pictures)
    if not count:
        return f"keeps as many as {reference}"
    side = "fewer" if lost > 0 else "more"
    return f"{100 * abs(lost):.1f} points {side} than {reference} ({count} of {pictures} pictures)"

"""Plots as SVG text: lines, bars and named points. The same figures give the same bytes on every machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 940, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 390, 46, 56  # at the right the names of peers, up to 53 letters
# Okabe and Ito's colours, which the colour-blind can tell apart; the floor is grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_FLOOR = "#888888"


def lines(
    title: str,
    x_title: str,
    y_title: str,
    series: Mapping[str, Sequence[Point]],
    *,
    floor: str = "",
    names: Mapping[float, str],
) -> str:
    """A line for each series, from 0 up. floor: the series drawn dashed and grey. names: x -> what stands below it."""
    top = _nice(max(y for points in series.values() for _, y in points))
    right = max(x for points in series.values() for x, _ in points)
    parts = [*_frame(title, x_title, y_title), *_y_axis(top)]
    for x, name in names.items():
        parts.append(_text(_x(x, right), _HEIGHT - _BOTTOM + 18, name, anchor="middle"))
    colours = iter(_COLOURS)
    for index, (name, points) in enumerate(series.items()):
        colour = _FLOOR if name == floor else next(colours)
        dash = ' stroke-dasharray="6 4"' if name == floor else ""
        path = " ".join(f"{_x(x, right):.1f},{_y(y, top):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if name != floor:
            parts += [
                f'<circle cx="{_x(x, right):.1f}" cy="{_y(y, top):.1f}" r="3.5" fill="{colour}"/>' for x, y in points
            ]
        parts += _legend(index, name, colour)
    return _document(parts)


def bars(title: str, y_title: str, values: Mapping[str, float], *, unit: str) -> str:
    """A bar for each value, its figure on top."""
    top = _nice(max(values.values()))
    parts = [*_frame(title, "", y_title, right=20), *_y_axis(top, right=20)]
    step = (_WIDTH - _LEFT - 20) / len(values)
    for index, (name, value) in enumerate(values.items()):
        left, width = _LEFT + step * (index + 0.2), step * 0.6
        place = (
            f'x="{left:.1f}" y="{_y(value, top):.1f}" width="{width:.1f}" height="{_y(0, top) - _y(value, top):.1f}"'
        )
        parts.append(f'<rect {place} fill="{_COLOURS[index % len(_COLOURS)]}"/>')
        middle = left + step * 0.3
        parts.append(_text(middle, _y(value, top) - 6, f"{value:,.3g} {unit}", anchor="middle"))
        parts.append(_text(middle, _HEIGHT - _BOTTOM + 18, name, anchor="middle"))
    return _document(parts)


def points(title: str, x_title: str, y_title: str, named: Mapping[str, Point]) -> str:
    """A named point each; y on a logarithmic scale, lower is better both ways."""
    right = _nice(max(x for x, _ in named.values()))
    low = math.floor(math.log10(min(y for _, y in named.values())))
    high = math.ceil(math.log10(max(y for _, y in named.values())))
    parts = _frame(title, x_title, y_title)

    def at(y: float) -> float:
        return _y((math.log10(y) - low) / max(high - low, 1), 1.0)

    for power in range(low, high + 1):
        parts.append(_grid(at(10.0**power)))
        parts.append(_text(_LEFT - 8, at(10.0**power) + 4, f"{10.0**power:g}", anchor="end"))
    for quarter in range(5):
        x = right * quarter / 4
        parts.append(_text(_x(x, right), _HEIGHT - _BOTTOM + 18, _number(x), anchor="middle"))
    for index, (name, (x, y)) in enumerate(named.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(_dot(_x(x, right), at(y), colour, 6))
        parts += _legend(index, name, colour)
    return _document(parts)


def _frame(title: str, x_title: str, y_title: str, right: int = _RIGHT) -> list[str]:
    middle = (_LEFT + _WIDTH - right) / 2
    turned = f'transform="rotate(-90 18 {_HEIGHT / 2:.0f})"'
    return [
        _text(_LEFT, 24, title, size=15, weight="bold"),
        _text(middle, _HEIGHT - 12, x_title, anchor="middle"),
        f'<text x="18" y="{_HEIGHT / 2:.0f}" text-anchor="middle" font-size="12" {turned}>{escape(y_title)}</text>',
        f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - right}" fill="none" stroke="#333333"/>',
    ]


def _y_axis(top: float, right: int = _RIGHT) -> list[str]:
    parts = []
    for quarter in range(5):
        y = top * quarter / 4
        parts.append(_grid(_y(y, top), right))
        parts.append(_text(_LEFT - 8, _y(y, top) + 4, _number(y), anchor="end"))
    return parts


def _grid(y: float, right: int = _RIGHT) -> str:
    return f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - right}" stroke="#DDDDDD"/>'


def _legend(index: int, name: str, colour: str) -> list[str]:
    x, y = _WIDTH - _RIGHT + 16, _TOP + 10 + 22 * index
    return [f'<rect x="{x}" y="{y - 9}" width="11" height="11" fill="{colour}"/>', _text(x + 17, y, name)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )


def _dot(x: float, y: float, colour: str, radius: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>'


def _document(parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="system-ui, sans-serif" fill="#222222">'
    )
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#FFFFFF"/>', *parts, "</svg>\n"])


def _x(x: float, right: float) -> float:
    return _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT)


def _y(y: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _nice(value: float) -> float:
    """The next of 1, 2, 4, 8 times a power of ten, so that quarters are short numbers."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value)

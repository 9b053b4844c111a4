"""Line charts as SVG: pictures that open anywhere and that a diff can show."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 44, 52
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
#: Entries that the space beside the chart has room for.
MOST_ENTRIES = 18


@dataclass(frozen=True)
class Line:
    """One line of a chart. Lines of one ``name`` share the colour of the first and its entry in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_dashed: bool = False

    def below(self, highest: float) -> Line:
        kept = [(x, y) for x, y in zip(self.x, self.y, strict=True) if y <= highest]
        return replace(self, x=[x for x, _ in kept], y=[y for _, y in kept])


def line_chart(
    path: Path, title: str, x_label: str, y_label: str, lines: Sequence[Line], highest: float = math.inf
) -> None:
    """Write ``lines`` as a chart to ``path``; what is above ``highest`` is left out."""
    lines = [line.below(highest) for line in lines]
    xs, ys = [x for line in lines for x in line.x], [y for line in lines for y in line.y]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (right - LEFT), bottom - up * (bottom - TOP)

    parts = [_text(LEFT, 24, title, 'font-size="15" font-weight="600"')]
    for tick in x_ticks:
        x, _ = at(tick, y_ticks[0])
        parts += [_rule(x, TOP, x, bottom), _text(x, bottom + 18, label(tick), 'text-anchor="middle"')]
    for tick in y_ticks:
        _, y = at(x_ticks[0], tick)
        parts += [_rule(LEFT, y, right, y), _text(LEFT - 8, y + 4, label(tick), 'text-anchor="end"')]
    parts.append(_text((LEFT + right) / 2, HEIGHT - 12, x_label, 'text-anchor="middle"'))
    middle = (TOP + bottom) / 2
    parts.append(_text(16, middle, y_label, f'text-anchor="middle" transform="rotate(-90 16 {middle})"'))
    names = list(dict.fromkeys(line.name for line in lines))
    for line in lines:
        colour = COLOURS[names.index(line.name) % len(COLOURS)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*pair) for pair in zip(line.x, line.y, strict=True)))
        dash = ' stroke-dasharray="6 4"' if line.is_dashed else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
    for row, name in enumerate(names[:MOST_ENTRIES]):
        y, colour = TOP + 8 + 20 * row, COLOURS[row % len(COLOURS)]
        parts.append(
            f'<line x1="{right + 14}" x2="{right + 36}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"/>'
        )
        parts.append(_text(right + 42, y + 4, name))
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="#111827"'
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    content = "\n".join([svg, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', *parts, "</svg>", ""])
    path.write_text(content, encoding="utf-8")


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers, evenly spaced, the first at most ``low`` and the last at least ``high``."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def label(tick: float) -> str:
    """Short: 250k, 1.5M."""
    for size, unit in ((1e6, "M"), (1e4, "k")):
        if abs(tick) >= size:
            return f"{tick / (1e6 if unit == 'M' else 1e3):g}{unit}"
    return f"{tick:g}"


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{html.escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#e5e7eb"/>'

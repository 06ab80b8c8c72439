"""Charts as inline SVG: pure functions of numbers to text; colours are the page's CSS variables.

A point is (step, value); a value of None is a gap. Everything that comes from outside is escaped.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]
MAX_POINTS = 500


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]
    style: str = "line"
    """CSS class of the line: "line" strong, "raw" faint, "second" in the other colour."""


@dataclass(frozen=True)
class Counts:
    """How many there are in each bin: below edges[0], from edges[i - 1] to below edges[i], from edges[-1] on."""

    name: str
    values: Sequence[int]
    style: str = "line"
    """CSS class of the columns: "line" or "second"."""


@dataclass(frozen=True)
class Mark:
    step: float
    label: str
    style: str
    """CSS class: "resume" is a dashed line with its label, anything else a tick on the axis."""


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points, each the mean of equally many neighbours; a gap only where all are gaps."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    thinned: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [value for _, value in part if value is not None]
        thinned.append((part[len(part) // 2][0], sum(values) / len(values) if values else None))
    return thinned


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Mean of the `window` points around each, of fewer at the ends; a gap stays a gap."""
    sums, counts = [0.0], [0]
    for _, value in points:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    half = max(0, window // 2)
    smoothed: list[Point] = []
    for index, (step, value) in enumerate(points):
        low, high = max(0, index - half), min(len(points), index + half + 1)
        mean = (sums[high] - sums[low]) / max(1, counts[high] - counts[low])
        smoothed.append((step, None if value is None else mean))
    return smoothed


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover low to high, about `count`; steps are 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    form: Callable[[float], str],
    *,
    marks: Sequence[Mark] = (),
    width: int = 540,
    height: int = 220,
    zero: bool = False,
    top: float | None = None,
) -> str:
    """A chart over steps with axes, marks and a crosshair (report.js).

    `form` writes a y value; `zero` starts the axis at 0; `top` cuts it and a note says what that hides.
    """
    drawn = [Series(s.name, thin(s.points), s.style) for s in series]
    values = [v for s in drawn for _, v in s.points if v is not None]
    steps = [x for s in drawn for x, _ in s.points]
    if not values:
        return _figure(title, '<p class="empty">no data yet</p>')
    hidden = 0 if top is None else sum(v is not None and v > top for _, v in series[0].points)
    high = min(max(values), top) if top is not None else max(values)
    y_ticks = ticks(0.0 if zero else min(values), high)
    frame = _Frame(width, height, 52, 12, 14, 26, min(steps), max(steps), y_ticks[0], y_ticks[-1])
    parts = [f'<clipPath id="{frame.id(title)}">{frame.rect()}</clipPath>']
    for tick in y_ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{width - frame.right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{form(tick)}</text>')
    for tick in ticks(frame.x0, frame.x1, 8 if width > 800 else 5):
        if frame.x0 <= tick <= frame.x1 and tick == int(tick):
            place = f'x="{frame.x(tick)}" y="{height - 8}" text-anchor="middle"'
            parts.append(f'<text class="tick" {place}>{int(tick):,}</text>')
    parts += _marks(frame, marks)
    parts.append(f'<g clip-path="url(#{frame.id(title)})">')
    parts += [f'<path class="{escape(s.style)}" d="{path(s.points, frame)}"/>' for s in drawn]
    parts.append("</g>")
    told = [s for s in drawn if s.style != "raw"] or drawn
    hover = {
        "left": frame.left,
        "top": frame.top,
        "bottom": height - frame.bottom,
        "x": [round(frame.x(x), 1) for x, _ in told[0].points],
        "step": [x for x, _ in told[0].points],
        "series": [
            {
                "name": s.name,
                "y": [None if v is None else round(frame.y(v), 1) for _, v in s.points],
                "text": ["-" if v is None else form(v) for _, v in s.points],
            }
            for s in told
        ],
    }
    label = escape(f"{title}: {form(values[0])} to {form(values[-1])} over steps {frame.x0:,.0f} to {frame.x1:,.0f}")
    svg = (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}" '
        f'data-hover="{escape(json.dumps(hover, ensure_ascii=False))}">{"".join(parts)}</svg>'
    )
    count = f"{hidden} points lie" if hidden > 1 else "1 point lies"
    note = f'<p class="note">{count} above the top of the axis</p>' if hidden else ""
    legend = ""
    if len(drawn) > 1:
        keys = "".join(f'<span><i class="{escape(s.style)}"></i>{escape(s.name)}</span>' for s in drawn)
        legend = f'<p class="legend">{keys}</p>'
    return _figure(title, legend + svg + note)


def mini_chart(name: str, points: Sequence[Point], low: float, high: float, span: tuple[float, float]) -> str:
    """A small multiple: one line in a frame that all of them share, its name and its last value."""
    drawn = thin(points, 120)
    last = next((v for _, v in reversed(drawn) if v is not None), None)
    width, height = 168, 74
    frame = _Frame(width, height, 4, 4, 6, 6, *span, low, high)
    dots = [(x, v) for x, v in drawn if v is not None]
    end = f'<circle cx="{frame.x(dots[-1][0])}" cy="{frame.y(dots[-1][1])}" r="2.6"/>' if dots else ""
    value = "-" if last is None else f"{last:.2f}"
    return (
        f'<div class="mini"><b>{escape(name)}</b><span>{value}</span>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}: loss, last {value}">'
        f'<line class="grid" x1="0" x2="{width}" y1="{height - 6}" y2="{height - 6}"/>'
        f'<line class="grid" x1="0" x2="{width}" y1="6" y2="6"/>'
        f'<path class="line" d="{path(dots, frame)}"/>{end}</svg></div>'
    )


def histogram(title: str, edges: Sequence[float], counts: Sequence[Counts], form: Callable[[float], str]) -> str:
    """Columns over the bins, one kind on top of the other; empty bins at both ends are left out.

    `form` writes an edge.
    """
    bins = [sum(values) for values in zip(*(kind.values for kind in counts), strict=True)]
    if not any(bins):
        return _figure(title, '<p class="empty">nothing was counted</p>')
    width, height, filled = 540, 220, [place for place, count in enumerate(bins) if count]
    y_ticks = ticks(0.0, max(bins))
    # A column of two bins at least: one would be as wide as the drawing.
    first, end = filled[0], max(filled[-1] + 1, filled[0] + 2)
    frame = _Frame(width, height, 52, 12, 14, 26, first, end, 0.0, y_ticks[-1])
    parts = []
    for tick in y_ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{width - frame.right}" y1="{y}" y2="{y}"/>')
        if tick == int(tick):
            at = f'x="{frame.left - 6}" y="{y + 3.5:.1f}" text-anchor="end"'
            parts.append(f'<text class="tick" {at}>{int(tick):,}</text>')
    for edge in range(first, min(end, len(edges) + 1), math.ceil((end - first) / 9)):
        if edge:
            at = f'x="{frame.x(edge)}" y="{height - 8}" text-anchor="middle"'
            parts.append(f'<text class="tick" {at}>{escape(form(edges[edge - 1]))}</text>')
    for place in filled:
        low = f"from {form(edges[place - 1])} " if place else ""
        high = f"to below {form(edges[place])}" if place < len(edges) else "on"
        told = ", ".join(f"{kind.name} {kind.values[place]:,}" for kind in counts if kind.values[place])
        columns = _column(frame, place, [(kind.style, kind.values[place]) for kind in counts])
        parts.append(f"<g>{columns}<title>{escape(f'{low}{high}: {told}')}</title></g>")
    legend = ""
    if len(counts) > 1:
        keys = (f'<i class="{escape(kind.style)}"></i>{escape(kind.name)} {sum(kind.values):,}' for kind in counts)
        legend = f'<p class="legend">{"".join(f"<span>{key}</span>" for key in keys)}</p>'
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return _figure(title, legend + svg)


def mini_histogram(name: str, value: str, counts: Sequence[Counts], span: tuple[int, int]) -> str:
    """A small multiple: columns over the bins from span[0] to below span[1], a name and a value."""
    width, height = 168, 56
    bins = [sum(values) for values in zip(*(kind.values for kind in counts), strict=True)]
    frame = _Frame(width, height, 0, 0, 4, 2, *span, 0.0, max(bins))
    drawn = "".join(
        _column(frame, place, [(kind.style, kind.values[place]) for kind in counts]) for place in range(*span)
    )
    return (
        f'<div class="mini"><b>{escape(name)}</b><span>{escape(value)}</span>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}: {escape(value)}">'
        f'<line class="grid" x1="0" x2="{width}" y1="{height - 2}" y2="{height - 2}"/>{drawn}</svg></div>'
    )


def path(points: Sequence[Point], frame: "_Frame") -> str:
    """The d attribute of a line through `points`; a gap lifts the pen, a lone point is a dot."""
    commands, down = [], False
    for index, (x, value) in enumerate(points):
        if value is None:
            down = False
            continue
        commands.append(f"{'L' if down else 'M'}{frame.x(x)} {frame.y(value)}")
        alone = not down and (index + 1 == len(points) or points[index + 1][1] is None)
        if alone:
            commands.append("h0.1")
        down = True
    return "".join(commands)


@dataclass(frozen=True)
class _Frame:
    """Where data lie in the drawing: size, the four margins, and the ranges of x and y."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        share = (value - self.x0) / ((self.x1 - self.x0) or 1.0)
        return round(self.left + share * (self.width - self.left - self.right), 1)

    def y(self, value: float) -> float:
        share = (value - self.y0) / ((self.y1 - self.y0) or 1.0)
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 1)

    def rect(self) -> str:
        across, down = self.width - self.left - self.right, self.height - self.top - self.bottom
        return f'<rect x="{self.left}" y="{self.top - 4}" width="{across + 4}" height="{down + 8}"/>'

    def id(self, title: str) -> str:
        return "clip-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in title)


def _column(frame: _Frame, place: int, parts: Sequence[tuple[str, int]]) -> str:
    """The rectangles of one bin, as (CSS class, count), the first at the bottom."""
    left, right, drawn, below = frame.x(place), frame.x(place + 1), "", 0
    for style, count in parts:
        top, floor = frame.y(below + count), frame.y(below)
        if count:  # at least a line that can be seen
            box = f'x="{left + 1:.1f}" y="{min(top, floor - 1):.1f}" width="{right - left - 2:.1f}"'
            drawn += f'<rect class="{escape(style)}" {box} height="{max(1.0, floor - top):.1f}"/>'
        below += count
    return drawn


def _marks(frame: _Frame, marks: Sequence[Mark]) -> list[str]:
    parts = []
    floor = frame.height - frame.bottom
    for mark in marks:
        x, what = frame.x(min(max(mark.step, frame.x0), frame.x1)), escape(mark.label)
        if mark.style == "resume":
            place = f'x="{x - 4}" text-anchor="end"' if x > frame.width * 0.8 else f'x="{x + 4}"'
            parts.append(
                f'<g class="mark resume"><line x1="{x}" x2="{x}" y1="{frame.top}" y2="{floor}"/>'
                f'<text {place} y="{frame.top + 8}">{what}</text></g>'
            )
        else:
            shape = f'class="mark {escape(mark.style)}" d="M{x} {floor}l-3.5 6h7z"'
            parts.append(f"<path {shape}><title>{what}</title></path>")
    return parts


def _figure(title: str, content: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{content}</figure>"

"""The report's plots as inline SVG: colours from the page's style sheet, text as text, tooltips without scripts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtu_fast.unlearning.report import axes
from mtu_fast.unlearning.report.axes import Scale, mark, scale, svg, ticks, x_axis
from mtu_fast.unlearning.report.markup import Markup, el, number, signed

__all__ = ["dots", "heat_map", "histogram", "key", "lines", "ticks"]

Points = Sequence[tuple[float, float]]
DASHES = (None, "6 3", "2 3", "8 3 2 3", "1 4")
# in which the marks of a row are drawn, the last one on top
LAYERS = ("original", "retrained", "unlearned")


def key(models: Sequence[str]) -> Markup:
    """Which mark is which model."""
    marks = []
    for model in models:
        picture = el(
            "svg",
            mark(model, 7, 7),
            width=14,
            height=14,
            viewBox="0 0 14 14",
            aria_hidden="true",
        )
        marks.append(el("span", picture, model))
    return el("div", marks, class_="key")


def dots(
    rows: Mapping[str, Mapping[str, float]],
    low: float,
    high: float,
    describe: str,
    band: Mapping[str, tuple[float, float]] | None = None,
    levels: Mapping[str, float] | None = None,
) -> Markup:
    """One line per row, one mark per model, on one axis.

    `band` shades a range in each row (what chance explains); `levels` are what a row is to reach.
    """
    left, width, step = 8 + 7.2 * max(map(len, rows)), 620.0, 34
    x = scale(low, high, left, width - 16)
    bottom = step * len(rows)
    shapes = x_axis(x, low, high, bottom + 4)
    for i, (name, values) in enumerate(rows.items()):
        y = step * i + step / 2 + 2
        if band is not None:
            shapes.append(_band(x, y, *band[name]))
        shapes.append(el("text", name, x=left - 12, y=y + 4, text_anchor="end"))
        if levels is not None and name in levels:
            shapes.append(_level(x(levels[name]), y - 14, y + 14, name, levels[name]))
        shapes += _row_of_dots(x, y, name, values)
    return svg(width, bottom + 30, describe, shapes)


def _level(x: float, top: float, bottom: float, name: str, value: float) -> Markup:
    """A dashed line at what is to be reached."""
    said = el("title", f"{name}, level to reach: {number(value)}")
    return el("line", said, x1=x, x2=x, y1=top, y2=bottom, class_="level", stroke_dasharray="4 3")


def _band(x: Scale, y: float, low: float, high: float) -> Markup:
    width = x(high) - x(low)
    return el(
        "rect", x=x(low), y=y - 12, width=width, height=24, fill="var(--good)", fill_opacity=0.16
    )


def _row_of_dots(x: Scale, y: float, name: str, values: Mapping[str, float]) -> Iterator[Markup]:
    at = list(map(x, values.values()))
    yield el("line", x1=min(at), x2=max(at), y1=y, y2=y, stroke="var(--line)", stroke_width=4)
    for model in LAYERS:
        if model in values:
            said = f"{name}, {model}: {number(values[model])}"
            yield mark(model, x(values[model]), y, said)


def histogram(
    found: Mapping[str, Any], title: str, describe: str, level: float | None = None
) -> Markup:
    """Counts on a logarithmic axis, so that single samples show: bars for unlearned, an outline for retrained.

    `level` is the mean change that is to be reached.
    """
    width, height, left, top, bottom = 300.0, 170.0, 34.0, 24.0, 140.0
    edges, counts = found["edges"], found["counts"]
    # at least one power of ten, so that the axis has two numbers
    most = math.log10(max(10, *map(max, counts.values())))
    x = scale(edges[0], edges[-1], left, width - 8)
    # a bar of one sample, log 1 = 0, must have some height
    y = scale(-0.15, most, bottom, top)
    shapes = [el("text", title, x=left, y=13, class_="title")]
    for power in range(int(most) + 1):
        at = y(float(power))
        shapes.append(axes.line(left, at, width - 8, at))
        shapes.append(axes.text(f"{10**power:,}", left - 6, at + 4))
    for low, high, count in _bins(edges, counts["unlearned"]):
        if count:
            shapes.append(_bar(x(low), x(high), y(math.log10(count)), bottom, low, high, count))
    if "retrained" in counts:
        shapes.append(_outline(edges, counts["retrained"], x, y, bottom))
    zero = x(0.0)
    shapes.append(
        el("line", x1=zero, x2=zero, y1=top, y2=bottom, class_="zero", stroke_dasharray="3 3")
    )
    if level is not None:
        at = x(min(max(level, edges[0]), edges[-1]))
        shapes.append(_level(at, top, bottom, title, level))
    shapes += x_axis(x, edges[0], edges[-1], bottom, lines=False, count=3)
    return svg(width, height, describe, shapes)


def _bins(edges: Sequence[float], counts: Sequence[int]) -> Iterator[tuple[float, float, int]]:
    """(left edge, right edge, count) of each bin."""
    return zip(edges[:-1], edges[1:], counts, strict=True)


def _bar(
    left: float, right: float, top: float, bottom: float, low: float, high: float, count: int
) -> Markup:
    said = f"{count} samples from {signed(low)} to {signed(high)}"
    return el(
        "rect",
        el("title", said),
        x=left + 0.4,
        y=top,
        width=max(right - left - 0.8, 0.6),
        height=bottom - top,
        fill="var(--unlearned)",
        fill_opacity=0.75,
    )


def _outline(
    edges: Sequence[float], counts: Sequence[int], x: Scale, y: Scale, bottom: float
) -> Markup:
    steps = []
    for low, high, count in _bins(edges, counts):
        up = y(math.log10(count)) if count else bottom
        steps.append(f"{x(low):.1f},{up:.1f} {x(high):.1f},{up:.1f}")
    points = " ".join(steps)
    return el("polyline", points=points, fill="none", stroke="var(--retrained)", stroke_width=1.6)


def heat_map(found: Mapping[str, Any], describe: str) -> Markup:
    """Layers down, task pairs across, cosines as colour and number."""
    pairs = found["pairs"]
    names = [layer or "(the model itself)" for layer in found["layers"]]
    # the heads of the rows of tasks stand there too, and must not be cut
    left = 14 + 6.6 * max(len(name) for name in (*names, "forget", "retain"))
    cell, row, top = 74.0, 22.0, 58.0
    width, height = left + cell * len(pairs) + 8, top + row * len(names) + 8
    shapes = [axes.text("forget", left - 10, 18), axes.text("retain", left - 10, 44)]
    for j, pair in enumerate(pairs):
        shapes += _pair(pair, left + cell * (j + 0.5))
    for i, layer in enumerate(names):
        y = top + row * i
        shapes.append(el("text", layer, x=left - 10, y=y + 15, text_anchor="end"))
        for j, (s, t) in enumerate(pairs):
            said = f"{layer}: forget {s}, retain {t}"
            shapes.append(_cell(found["mean"][i][j], left + cell * j, y, cell, row, said))
    return svg(width, height, describe, shapes)


def _pair(pair: Sequence[str], x: float) -> list[Markup]:
    """The head of a column: forget task × retain task."""
    forget, retain = map(_short, pair)
    return [
        el("text", forget, x=x, y=18, text_anchor="middle"),
        axes.text("×", x, 31, anchor="middle"),
        el("text", retain, x=x, y=44, text_anchor="middle"),
    ]


def _cell(
    value: float | None, x: float, y: float, width: float, height: float, said: str
) -> Markup:
    tint, strength = _colour(value)
    label = signed(value, 2)
    box = el(
        "rect",
        x=x + 1,
        y=y + 1,
        width=width - 2,
        height=height - 2,
        rx=3,
        fill=tint,
        fill_opacity=strength,
    )
    words = el("text", label, x=x + width / 2, y=y + 15, text_anchor="middle")
    return el("g", el("title", f"{said}: {label}"), box, words)


def _colour(cosine: float | None) -> tuple[str, float]:
    """Colour and opacity; the root shows small cosines, which most are."""
    if cosine is None:
        return "var(--line)", 0.25
    tint = "var(--with)" if cosine > 0 else "var(--against)"
    return tint, 0.75 * min(abs(cosine), 1.0) ** 0.5


def lines(
    series: Mapping[str, Points],
    title: str,
    describe: str,
    levels: Mapping[str, float] | None = None,
) -> Markup:
    """Values over steps, a colour and a dash pattern per series, its name at its end; `levels` are to be reached."""
    width, height, left, top, bottom = 300.0, 190.0, 42.0, 24.0, 158.0
    right = width - 12 - 7.0 * max(map(len, series))
    steps, values = _coordinates(series)
    aims = {name: level for name, level in (levels or {}).items() if name in series}
    values += aims.values()
    pad = 0.05 * (max(values) - min(values)) or 0.5
    low, high = min(values) - pad, max(values) + pad  # lines do not touch the frame
    x = scale(min(steps), max(steps), left, right)
    y = scale(low, high, bottom, top)
    shapes = [el("text", title, x=left, y=13, class_="title")]
    for tick in ticks(low, high, 4):
        shapes.append(axes.line(left, y(tick), right, y(tick)))
        shapes.append(axes.text(axes.tick_label(tick), left - 6, y(tick) + 4))
    heights = _apart([(y(points[-1][1]), name) for name, points in series.items()])
    for i, (name, points) in enumerate(series.items()):
        colour = f"var(--s{i % 5})"
        if name in aims:
            shapes.append(_aim(left, right, y(aims[name]), colour, name, aims[name]))
        shapes.append(_polyline(name, points, x, y, colour, DASHES[i % 5]))
        label = el("text", name, x=right + 6, y=heights[name] + 4, style=f"fill: {colour}")
        shapes.append(label)
    shapes += x_axis(x, min(steps), max(steps), bottom, lines=False, count=4)
    return svg(width, height, describe, shapes, axes.text("step", right, height - 2))


def _aim(left: float, right: float, y: float, colour: str, name: str, value: float) -> Markup:
    """A thin dotted line at what a series is to reach."""
    said = el("title", f"{name}, level to reach: {number(value)}")
    return el(
        "line", said, x1=left, x2=right, y1=y, y2=y, style=f"stroke: {colour}", class_="level",
        stroke_dasharray="1 3",
    )  # fmt: skip


def _coordinates(series: Mapping[str, Points]) -> tuple[list[float], list[float]]:
    """Steps and values of all points."""
    steps, values = [], []
    for points in series.values():
        for step, value in points:
            steps.append(step)
            values.append(value)
    return steps, values


def _polyline(
    name: str, points: Points, x: Scale, y: Scale, colour: str, dash: str | None
) -> Markup:
    path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    return el(
        "polyline",
        el("title", name),
        points=path,
        fill="none",
        stroke=colour,
        stroke_width=2,
        stroke_dasharray=dash,
    )


def _apart(ends: Sequence[tuple[float, str]], least: float = 14.0) -> dict[str, float]:
    """Heights of labels moved down until none covers another."""
    found: dict[str, float] = {}
    above = -math.inf
    for y, name in sorted(ends):
        above = max(y, above + least)
        found[name] = above
    return found


def _short(name: str, length: int = 10) -> str:
    if len(name) <= length:
        return name
    return f"{name[: length - 1]}…"

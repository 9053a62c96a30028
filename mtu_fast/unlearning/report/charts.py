"""The report's plots as inline SVG: colours from the page's style sheet, text as text, tooltips without scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtu_fast.unlearning.report.markup import Markup, el, number, signed

MARKS = {"original": "circle", "unlearned": "diamond", "retrained": "square"}


def svg(width: float, height: float, describe: str, *children: Any) -> Markup:
    """A picture that a screen reader announces as `describe`."""
    box = f"0 0 {width:g} {height:g}"
    return el(
        "svg", el("title", describe), *children, viewBox=box, width=width, height=height, role="img"
    )


def key(models: Sequence[str]) -> Markup:
    """Which mark is which model."""
    marks = [
        el(
            "span",
            el("svg", _mark(m, 7, 7), width=14, height=14, viewBox="0 0 14 14", aria_hidden="true"),
            m,
        )
        for m in models
    ]
    return el("div", marks, class_="key")


def dots(rows: Mapping[str, Mapping[str, float]], low: float, high: float, describe: str,
         band: Mapping[str, tuple[float, float]] | None = None) -> Markup:  # fmt: skip
    """A line a row, a mark a model, on one axis; `band` shades a range in each row (what chance explains, say)."""
    left, width, step = 8 + 7.2 * max(map(len, rows)), 620.0, 34
    x = _scale(low, high, left, width - 16)
    height = step * len(rows) + 30
    shapes: list[Markup] = [*_x_axis(x, low, high, step * len(rows) + 4)]
    for i, (name, values) in enumerate(rows.items()):
        y = step * i + step / 2 + 2
        if band is not None:
            a, b = band[name]
            shapes.append(el("rect", x=x(a), y=y - 12, width=x(b) - x(a), height=24, fill="var(--good)",
                             fill_opacity=0.16))  # fmt: skip
        shapes.append(el("text", name, x=left - 12, y=y + 4, text_anchor="end"))
        at = [x(value) for value in values.values()]
        shapes.append(
            el("line", x1=min(at), x2=max(at), y1=y, y2=y, stroke="var(--line)", stroke_width=4)
        )
        shapes += [_mark(model, x(values[model]), y, f"{name}, {model}: {number(values[model])}")
                   for model in ("original", "retrained", "unlearned") if model in values]  # fmt: skip
    return svg(width, height, describe, shapes)


def histogram(found: Mapping[str, Any], title: str, describe: str) -> Markup:
    """Counts on a logarithmic axis, so that single samples show: bars for unlearned, an outline for retrained."""
    width, height, left, top, bottom = 300.0, 170.0, 34.0, 24.0, 140.0
    edges, counts = found["edges"], found["counts"]
    most = max(max(c) for c in counts.values())
    x, y = (
        _scale(edges[0], edges[-1], left, width - 8),
        _scale(-0.15, math.log10(max(most, 10)), bottom, top),
    )
    shapes = [el("text", title, x=left, y=13, class_="title")]
    for power in range(int(math.log10(max(most, 10))) + 1):
        at = y(float(power))
        shapes += [el("line", x1=left, x2=width - 8, y1=at, y2=at, class_="axis"),
                   el("text", f"{10**power:,}", x=left - 6, y=at + 4, text_anchor="end", class_="soft")]  # fmt: skip
    for a, b, n in zip(edges[:-1], edges[1:], counts["unlearned"], strict=True):
        if n:
            up = y(math.log10(n))
            said = f"{n} samples from {signed(a)} to {signed(b)}"
            shapes.append(el("rect", el("title", said), x=x(a) + 0.4, y=up, width=max(x(b) - x(a) - 0.8, 0.6),
                             height=bottom - up, fill="var(--unlearned)", fill_opacity=0.75))  # fmt: skip
    if "retrained" in counts:
        shapes.append(_outline(edges, counts["retrained"], x, y, bottom))
    zero = x(0.0)
    shapes.append(
        el("line", x1=zero, x2=zero, y1=top, y2=bottom, class_="zero", stroke_dasharray="3 3")
    )
    return svg(
        width,
        height,
        describe,
        shapes,
        _x_axis(x, edges[0], edges[-1], bottom, lines=False, count=3),
    )


def _outline(
    edges: Sequence[float], counts: Sequence[int], x: Any, y: Any, bottom: float
) -> Markup:
    tops = [y(math.log10(n)) if n else bottom for n in counts]
    steps = [f"{x(a):.1f},{up:.1f} {x(b):.1f},{up:.1f}"
             for a, b, up in zip(edges[:-1], edges[1:], tops, strict=True)]  # fmt: skip
    return el(
        "polyline", points=" ".join(steps), fill="none", stroke="var(--retrained)", stroke_width=1.6
    )


def heat_map(found: Mapping[str, Any], describe: str) -> Markup:
    """Layers down, task pairs across, cosines as colour and number."""
    layers, pairs, means = found["layers"], found["pairs"], found["mean"]
    names = [layer or "(the model itself)" for layer in layers]
    left, cell, row, top = 14 + 6.6 * max(map(len, names)), 74.0, 22.0, 58.0
    width, height = left + cell * len(pairs) + 8, top + row * len(layers) + 8
    shapes = [el("text", "forget", x=left - 10, y=18, text_anchor="end", class_="soft"),
              el("text", "retain", x=left - 10, y=44, text_anchor="end", class_="soft")]  # fmt: skip
    for j, (s, t) in enumerate(pairs):
        middle = left + cell * (j + 0.5)
        shapes += [el("text", _short(s), x=middle, y=18, text_anchor="middle"),
                   el("text", "×", x=middle, y=31, text_anchor="middle", class_="soft"),
                   el("text", _short(t), x=middle, y=44, text_anchor="middle")]  # fmt: skip
    for i, layer in enumerate(names):
        y = top + row * i
        shapes.append(el("text", layer, x=left - 10, y=y + 15, text_anchor="end"))
        shapes += [_cell(means[i][j], left + cell * j, y, cell, row, f"{layer}: forget {s}, retain {t}")
                   for j, (s, t) in enumerate(pairs)]  # fmt: skip
    return svg(width, height, describe, shapes)


def _cell(
    value: float | None, x: float, y: float, width: float, height: float, said: str
) -> Markup:
    tint = "var(--line)" if value is None else "var(--with)" if value > 0 else "var(--against)"
    strength = 0.25 if value is None else 0.75 * min(abs(value), 1.0) ** 0.5  # most are small
    text = signed(value, 2)
    return el(
        "g", el("title", f"{said}: {text}"),
        el("rect", x=x + 1, y=y + 1, width=width - 2, height=height - 2, rx=3, fill=tint, fill_opacity=strength),
        el("text", text, x=x + width / 2, y=y + 15, text_anchor="middle"),
    )  # fmt: skip


def lines(series: Mapping[str, Sequence[tuple[float, float]]], title: str, describe: str) -> Markup:
    """Values over steps, a colour and a dash pattern a series, its name at its end."""
    width, height, left, top, bottom = 300.0, 190.0, 42.0, 24.0, 158.0
    points = [p for line in series.values() for p in line]
    right = width - 12 - 7.0 * max(map(len, series))
    steps, values = [p[0] for p in points], [p[1] for p in points]
    pad = 0.05 * (max(values) - min(values)) or 0.5
    x, y = (
        _scale(min(steps), max(steps), left, right),
        _scale(min(values) - pad, max(values) + pad, bottom, top),
    )
    shapes = [el("text", title, x=left, y=13, class_="title")]
    for tick in ticks(min(values) - pad, max(values) + pad, 4):
        shapes += [el("line", x1=left, x2=right, y1=y(tick), y2=y(tick), class_="axis"),
                   el("text", _tick(tick), x=left - 6, y=y(tick) + 4, text_anchor="end", class_="soft")]  # fmt: skip
    ends = _apart([(y(line[-1][1]), name) for name, line in series.items()])
    for i, (name, line) in enumerate(series.items()):
        colour, dash = f"var(--s{i % 5})", (None, "6 3", "2 3", "8 3 2 3", "1 4")[i % 5]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        shapes += [el("polyline", el("title", name), points=path, fill="none", stroke=colour, stroke_width=2,
                      stroke_dasharray=dash),
                   el("text", name, x=right + 6, y=ends[name] + 4, style=f"fill: {colour}")]  # fmt: skip
    return svg(width, height, describe, shapes, _x_axis(x, min(steps), max(steps), bottom, lines=False, count=4),
               el("text", "step", x=right, y=height - 2, text_anchor="end", class_="soft"))  # fmt: skip


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _apart(ends: Sequence[tuple[float, str]], least: float = 14.0) -> dict[str, float]:
    """Heights of labels moved down until none covers another."""
    found: dict[str, float] = {}
    above = -math.inf
    for y, name in sorted(ends):
        above = found[name] = max(y, above + least)
    return found


def _scale(low: float, high: float, start: float, end: float) -> Any:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _x_axis(
    x: Any, low: float, high: float, y: float, lines: bool = True, count: int = 5
) -> list[Markup]:
    found = [el("line", x1=x(low), x2=x(high), y1=y, y2=y, class_="axis")]
    for tick in ticks(low, high, count):
        found += [
            el("line", x1=x(tick), x2=x(tick), y1=2, y2=y, class_="axis") if lines else Markup(""),
            el("text", _tick(tick), x=x(tick), y=y + 16, text_anchor="middle", class_="soft"),
        ]
    return found


def _tick(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _mark(model: str, x: float, y: float, said: str | None = None) -> Markup:
    colour, inside = f"var(--{model})", None if said is None else el("title", said)
    if MARKS[model] == "circle":
        return el(
            "circle", inside, cx=x, cy=y, r=5.5, fill="var(--card)", stroke=colour, stroke_width=2.5
        )
    if MARKS[model] == "square":
        return el(
            "rect", inside, x=x - 5, y=y - 5, width=10, height=10, fill=colour, fill_opacity=0.85
        )
    around = f"{x:.1f},{y - 7:.1f} {x + 7:.1f},{y:.1f} {x:.1f},{y + 7:.1f} {x - 7:.1f},{y:.1f}"
    return el("polygon", inside, points=around, fill=colour, stroke="var(--card)")


def _short(name: str, length: int = 10) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"

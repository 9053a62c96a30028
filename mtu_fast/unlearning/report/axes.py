"""What the report's plots share: scales, ticks, axes, marks of models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mtu_fast.unlearning.report.markup import Markup, el

MARKS = {"original": "circle", "unlearned": "diamond", "retrained": "square"}
ROUND = (1, 2, 2.5, 5, 10)  # steps between ticks, times a power of ten
Scale = Callable[[float], float]


def svg(width: float, height: float, describe: str, *children: Any) -> Markup:
    """A picture that a screen reader announces as `describe`."""
    box = f"0 0 {width:g} {height:g}"
    return el(
        "svg", el("title", describe), *children, viewBox=box, width=width, height=height, role="img"
    )


def scale(low: float, high: float, start: float, end: float) -> Scale:
    """Values from low to high as places from start to end."""
    # one value alone has no span, and lands at the start
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    # a hair less, since powers of ten are rounded
    step = next(m * power for m in ROUND if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def x_axis(
    x: Scale, low: float, high: float, y: float, lines: bool = True, count: int = 5
) -> list[Markup]:
    """The axis at height y, its numbers, and a line upwards at each of them."""
    found = [line(x(low), y, x(high), y)]
    for tick in ticks(low, high, count):
        at = x(tick)
        if lines:
            found.append(line(at, 2, at, y))
        found.append(text(tick_label(tick), at, y + 16, anchor="middle"))
    return found


def line(x1: float, y1: float, x2: float, y2: float) -> Markup:
    """A line of an axis."""
    return el("line", x1=x1, x2=x2, y1=y1, y2=y2, class_="axis")


def text(said: str, x: float, y: float, anchor: str = "end") -> Markup:
    """Words beside an axis."""
    return el("text", said, x=x, y=y, text_anchor=anchor, class_="soft")


def tick_label(value: float) -> str:
    """A number at an axis."""
    return f"{value:.4g}".replace("-", "−")


def mark(model: str, x: float, y: float, said: str | None = None) -> Markup:
    """The mark of a model; `said` is its tooltip."""
    colour = f"var(--{model})"
    inside = None if said is None else el("title", said)
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

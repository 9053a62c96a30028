"""HTML and SVG elements from Python, escaped unless they are markup already."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

VOID = {"meta", "br", "hr"}


class Markup(str):
    """Text that is HTML already."""


def el(tag: str, *children: Any, **attributes: Any) -> Markup:
    """`<tag attributes>children</tag>`.

    Args:
        tag: name of the element.
        *children: Markup as it is; None nothing; iterables of children; anything else as escaped
            text.
        **attributes: `class_` for class, `font_size` for font-size; None and False leave one out,
            numbers are rounded.

    Returns:
        The element.
    """
    pairs = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    given = [(name, value) for name, value in pairs if value is not None and value is not False]
    head = "".join(f' {name}="{escape(_text(value))}"' for name, value in given)
    return Markup(f"<{tag}{head}>" if tag in VOID else f"<{tag}{head}>{join(children)}</{tag}>")


def join(children: Iterable[Any]) -> Markup:
    """Children one after another."""
    return Markup("".join(map(_child, children)))


def _child(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str) or not isinstance(child, Iterable):
        return escape(_text(child))
    return join(child)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def number(value: float | int | None, digits: int = 3) -> str:
    """A number for people: a dash where there is none, a true minus sign, an exponent only for the very large."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    size = abs(value)
    text = f"{value:.1e}" if size >= 1e6 else f"{value:.{digits if size < 100 else 1}f}"
    return text.lstrip("-") if not text.strip("-0.") else text.replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """`number` with a plus sign where it is positive."""
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 and text.strip("0.") else text

"""HTML and SVG elements from Python, escaped unless they are markup already."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any

VOID = {"meta", "br", "hr"}
# control characters, those that change the direction of what follows, halves of surrogate pairs,
# and what is no character
HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


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
    head = ""
    for name, value in attributes.items():
        if value is not None and value is not False:
            # `class_` and `stroke_width` stand for names that Python does not allow
            head += f' {name.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
    if tag in VOID:
        return Markup(f"<{tag}{head}>")
    return Markup(f"<{tag}{head}>{join(children)}</{tag}>")


def join(children: Iterable[Any]) -> Markup:
    """Children one after another."""
    return Markup("".join(map(_child, children)))


def _child(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, Iterable) and not isinstance(child, str):
        return join(child)
    return _escaped(child)


def _escaped(value: Any) -> str:
    """Text without markup; what nobody would see is written as its code."""
    return HIDDEN.sub(_code, escape(_text(value)))


def _code(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def number(value: float | int | None, digits: int = 3) -> str:
    """A number for people: a dash where there is none, a true minus sign, an exponent only for the very large."""
    if value is None:
        return "–"
    if isinstance(value, int):
        text = f"{value:,}"
    elif abs(value) >= 1e6:
        text = f"{value:.1e}"
    elif abs(value) >= 100:
        text = f"{value:.1f}"
    else:
        text = f"{value:.{digits}f}"
    if not text.strip("-0."):  # no minus sign before a zero
        return text.lstrip("-")
    return text.replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """`number` with a plus sign where it is positive."""
    text = number(value, digits)
    if value is None or not value > 0 or not text.strip("0."):
        return text
    return f"+{text}"

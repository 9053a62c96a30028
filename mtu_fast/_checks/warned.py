"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings


def warn(text: str, kind: type[Warning] = UserWarning) -> None:
    """A warning at the line that called the package, however deep within it the reason is found."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("mtu_fast."):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, kind, stacklevel=level)

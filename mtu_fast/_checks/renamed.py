"""Names of before, which go in the next version."""

from __future__ import annotations

import warnings


def warn_renamed(thing: str, old: str, new: str) -> None:
    """Say that the method or property that calls this has another name now."""
    warnings.warn(
        f"{thing}.{old} is called {thing}.{new} now; the old name goes in the next version.",
        DeprecationWarning,
        stacklevel=3,
    )

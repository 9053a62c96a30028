"""The zoo: tiny models that hold every way a parameter may enter a graph; a wrong dimension shows, since all differ."""

from __future__ import annotations

from tests.helpers.models import (
    convolution,
    layout,
    linear,
    norms,
    objectives,
    sharing,
    tokens,
    training,
)
from tests.helpers.models.base import CASES, TASKS, Case, MultiTask

__all__ = [
    "CASES",
    "TASKS",
    "Case",
    "MultiTask",
    "by_name",
    "convolution",
    "layout",
    "linear",
    "norms",
    "objectives",
]
__all__ += ["sharing", "tokens", "training"]


def by_name(name: str) -> Case:
    """The case registered under `name`."""
    found = {case.name: case for case in CASES}
    if name not in found:
        raise KeyError(f"no case {name!r} in the zoo; it holds {sorted(found)}")
    return found[name]

"""Parameters that are not there as a whole: whoever runs a node outside a pass asks for what it saved of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, Protocol


class Mode(Enum):
    """What hooks of a backward do about parameters.

    Attributes:
        WHOLE: they bring them back, and let go of them.
        NONE: nothing: nodes are looked at, and not run.
        HOLLOW: they give them memory and no numbers: nodes are run, and compute nothing.
    """

    WHOLE = "whole"
    NONE = "none"
    HOLLOW = "hollow"


class Fetcher(Protocol):
    """What brings parameters back.

    Attributes:
        mode: what hooks do.
    """

    mode: Mode

    def fetch(self, storages: Collection[int], keep: bool) -> None: ...

    def keep_all(self) -> None: ...


_ACTIVE: list[Fetcher] = []  # the one of the rows that are being taken; empty where all is there


@contextmanager
def fetching(fetcher: Fetcher | None) -> Iterator[None]:
    """Rows are taken of a model whose parameters this brings back; None where they are there."""
    if fetcher is None:
        yield
        return
    _ACTIVE.append(fetcher)
    try:
        yield
    finally:
        _ACTIVE.pop()


@contextmanager
def hooks_do(mode: Mode) -> Iterator[None]:
    """What hooks do about parameters meanwhile."""
    if not _ACTIVE:
        yield
        return
    fetcher = _ACTIVE[-1]
    before, fetcher.mode = fetcher.mode, mode
    try:
        yield
    finally:
        fetcher.mode = before


def fetch(node: Any, storages: Callable[[Any], Collection[int]], keep: bool = False) -> None:
    """Bring back the parameters that a node saved, which lie in these storages: until the next call, or the end."""
    if _ACTIVE:
        _ACTIVE[-1].fetch(storages(node), keep)

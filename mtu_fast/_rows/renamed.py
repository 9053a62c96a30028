"""Names that `Rows` had before, for one version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from mtu_fast._checks.renamed import warn_renamed


class Renamed:
    """Methods of rows by their names of before: each warns, and calls the one of now."""

    def combine(self: Any, w: Tensor) -> Any:
        """`vjp`; deprecated."""
        warn_renamed("rows", "combine(w)", "vjp(w)")
        return self.vjp(w)

    def push(self: Any, d: Mapping[Tensor, Tensor], per: str = "total") -> Any:
        """`jvp`; deprecated."""
        warn_renamed("rows", "push(d)", "jvp(d)")
        return self.jvp(d, per)

    def kept(self: Any, tasks: Iterable[str] | None = None) -> Any:
        """`to_subspace`; deprecated."""
        warn_renamed("rows", "kept(tasks)", "to_subspace(tasks)")
        return self.to_subspace(tasks)

    def update(self: Any, method: Any, *, outside: Tensor | None = None) -> Any:
        """`backward(method, check=False)`; deprecated."""
        warn_renamed("rows", "update(method)", "backward(method, check=False)")
        return self.backward(method, outside=outside, check=False)

    @property
    def held(self: Any) -> Any:
        """`nbytes`; deprecated."""
        warn_renamed("rows", "held", "nbytes")
        return self.nbytes

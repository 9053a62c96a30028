"""Parameters added, subtracted, multiplied or expanded into an activation: rows are sums of b over positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtu_fast.rowmap import RowMap
from mtu_fast.rules.base import rule, scaled, summed
from mtu_fast.uses import Use


@rule("AddBackward0")
def add(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """`out = self + alpha·other`."""
    return summed(b if slot == 0 else scaled(b, node._saved_alpha), rows, shape)


@rule("SubBackward0")
def sub(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """`out = self - alpha·other`."""
    return summed(b if slot == 0 else b * -node._saved_alpha, rows, shape)


@rule("MulBackward0")
def mul(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """`out = self · other`."""
    factor = node._saved_other if slot == 0 else node._saved_self
    return summed(b * (factor.detach() if isinstance(factor, Tensor) else factor), rows, shape)


@rule("ExpandBackward0")
def expand(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """`out = parameter.expand(…)`: a class token, a position embedding."""
    return summed(b, rows, shape)

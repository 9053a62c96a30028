"""What rules share: the map from elements of an output gradient to rows, and the registry.

A rule is a pure function `(node, slot, shape, b, rows) -> Use | None`:

* node   the autograd node, read through its `_saved_*` attributes only
* slot   which of the node's inputs the parameter is, an index into `node.next_functions`
* shape  the shape of that input
* b      the gradient of the losses with respect to the node's output
* rows   the `RowMap` of b

It returns None where it does not apply; the exact generic path then serves. What takes gradients of
several outputs, or has work that its inputs share, is written as what a rule becomes in the
registry (`Served`): a function of all wanted inputs and all outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import wraps
from typing import Any

from torch import Tensor

from mtu_fast._graph.rowmap import RowMap, Summing
from mtu_fast._graph.table import Table
from mtu_fast._ops._blocks import cast, working_dtype
from mtu_fast._rows.uses import Dense, Use

Shape = tuple[int, ...]
Rule = Callable[[Any, int, Shape, Tensor, RowMap], Use | None]
# (node, {wanted slot: shape}, gradients, their row maps) -> {slot: use}, for the slots that are
# served
Served = Callable[
    [Any, Mapping[int, Shape], Sequence[Tensor | None], Sequence[RowMap | None]], dict[int, Use]
]

RULES: Table[Served] = Table()


def rule(names: str, slots: Container[int] = range(3)) -> Callable[[Rule], Rule]:
    """Register a function `(node, slot, shape, b, rows) -> use or None` as the rule of some autograd nodes.

    Args:
        names: of the nodes, as `output.grad_fn.name()` gives them, parted by spaces.
        slots: the inputs that the rule serves, where one is a parameter; indices into
            `node.next_functions`.

    Returns:
        The decorator; it leaves the function as it is, and raises a ValueError where a node of
        that name has a rule.
    """

    def register(function: Rule) -> Rule:
        @wraps(function)
        def served(
            node: Any,
            wanted: Mapping[int, Shape],
            grads: Sequence[Tensor | None],
            maps: Sequence[RowMap | None],
        ) -> dict[int, Use]:
            b, rows = grads[0], maps[0]
            # a gradient of another output adds to the input's, which a rule does not see
            if b is None or rows is None:
                return {}
            if len(grads) > 1 and any(g is not None for g in grads[1:]):
                return {}
            uses: dict[int, Use] = {}
            for slot, shape in wanted.items():
                if slot in slots and (use := function(node, slot, shape, b, rows)) is not None:
                    uses[slot] = use
            return uses

        RULES.entry(names)(served)
        return function

    return register


def scaled(b: Tensor, factor: float) -> Tensor:
    """`factor · b`, b itself where the factor is 1."""
    return b if factor == 1 else b * factor


def summed(b: Tensor, rows: RowMap, shape: tuple[int, ...]) -> Dense | None:
    """`rows[r] = Σ b` over the row's positions and over every dimension that a parameter of this shape broadcasts.

    The gradient of an addend, and of a factor after multiplication by the other side. A tensor
    that broadcasts does so from the right, as in torch.

    Args:
        b: the gradient of the output, or its product with the other side, `[…, D, …]`.
        rows: which row each element of b belongs to.
        shape: of the parameter.

    Returns:
        Rows `[N, *shape]`; None where the parameter varies along the row dimension, so that
        positions of one row are not alike.
    """
    key = shape, b.shape
    how = rows.sums.get(key)
    if how is None:
        how = rows.sums[key] = summing(b, rows, shape)
    if not how.over:
        return None
    dtype = working_dtype(b)
    whole = (rows.count, *shape)
    # With nothing to add the rows are b itself, but for one that would keep a larger tensor alive.
    if how.alone and b.untyped_storage().nbytes() <= b.numel() * b.element_size():
        found = cast(b if how.same else rows.split(b, how.dim), dtype)
    else:
        found = rows.split(b, how.dim).sum(how.over, dtype=dtype)
    return Dense(shape, found if found.shape == whole else found.reshape(whole))


def summing(b: Tensor, rows: RowMap, shape: tuple[int, ...]) -> Summing:
    """How `summed` sums gradients of this shape: over nothing where it cannot."""
    if rows.dim is None:
        return Summing(0)
    missing = b.dim() - len(shape)
    at = rows.dim - missing  # the row dimension, counted in the parameter's shape
    if at >= 0 and shape[at] != 1:
        return Summing(0)
    parts = rows.split(b, rows.dim)  # [N, S, …]
    kept = [1] * missing + list(shape)
    del kept[rows.dim]
    # positions of a row, and what the parameter broadcasts
    over = (1, *(d + 2 for d, size in enumerate(kept) if size == 1))
    alone = all(parts.shape[d] == 1 for d in over)
    in_order = rows.dim == 0 and rows.inner > 0
    return Summing(rows.dim, over, alone, alone and in_order and b.shape == (rows.count, *shape))

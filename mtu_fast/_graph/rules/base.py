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

from mtu_fast._graph.rowmap import RowMap
from mtu_fast._graph.table import Table
from mtu_fast._ops._blocks import working_dtype
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
            if b is None or rows is None or any(g is not None for g in grads[1:]):
                return {}
            uses: dict[int, Use] = {}
            for slot, shape in wanted.items():
                use = function(node, slot, shape, b, rows) if slot in slots else None
                if use is not None:
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
    if rows.dim is None:
        return None
    at = rows.dim - b.dim() + len(shape)  # the row dimension, counted in the parameter's shape
    if at >= 0 and shape[at] != 1:
        return None
    parts = rows.split(b, rows.dim)  # [N, S, …]
    kept = [1] * (b.dim() - len(shape)) + list(shape)
    del kept[rows.dim]
    # positions of a row, and what the parameter broadcasts
    over = [1] + [d + 2 for d, size in enumerate(kept) if size == 1]
    dtype = working_dtype(b)
    nothing_to_add = all(parts.shape[d] == 1 for d in over)
    # With nothing to add the rows are b itself, but for one that would keep a larger tensor alive.
    if nothing_to_add and b.untyped_storage().nbytes() <= b.numel() * b.element_size():
        return Dense(shape, parts.to(dtype).reshape(rows.count, *shape))
    return Dense(shape, parts.sum(over, dtype=dtype).view(rows.count, *shape))

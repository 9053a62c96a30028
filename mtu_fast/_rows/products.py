"""`G = J Jᵀ` of one parameter, over the rows of several uses of whatever kinds.

Uses of one shape and chain meet on this side of the chain: kinds of factors by their ops, others as
explicit rows, a tile at a time. Other uses meet in the space of the parameter itself, as explicit
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm, prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtu_fast._ops import gram as op
from mtu_fast._ops._blocks import WIDE
from mtu_fast._ops._pooling import Into, rows_of_gram, summed_gram, summed_rows
from mtu_fast._ops._tiles import buffer
from mtu_fast._rows.merge import aligned, by_block, parts_of, sum_of
from mtu_fast._rows.uses import Common, Conv, Dense, Gather, Outer, Stacked, Use

U = TypeVar("U", bound=Use)
# elements of explicit rows that are written, added to and multiplied before they leave the cache
ROWS_IN_CACHE = 1 << 20
Kind = object  # what two uses must have in common to be multiplied by one op
OfKind = tuple[list[int], list[Use]]  # which of the uses have parts of a kind, and those


def gram(
    uses: Sequence[Use], precision: str = "highest", known: int = 0, into: Into = ()
) -> Tensor:
    """`G = J Jᵀ` of one parameter over the rows of several uses, float64 `[R, R]`; `precision` as in `ops.gram`.

    Kinds of factors go to their ops, kind by kind and pair by pair; what has no op meets as
    explicit rows, a tile of them at a time where uses share their space. Products of the last
    `known` rows with one another are left out; they are not made where some rows are explicit. Rows
    with one number in `into` are summed: before they are multiplied where they are formed, which is
    then less work.
    """
    # behind unequal chains only the rows of the parameter itself can meet
    if not aligned(uses):
        return summed_gram(op.row_gram([u.grounded().matrix() for u in uses], known), into)
    if known and any(isinstance(use, Dense) for use in uses):
        return _tiled_gram(uses, known, into)
    kinds = _apart(uses)
    if len(kinds) == 1:
        found = _gram_alike(uses, precision, into)
    else:
        found = summed_gram(_gram_of_kinds(uses, kinds, precision), into)
    if known:
        found[-known:, -known:] = 0.0
    return found


def _gram_of_kinds(uses: Sequence[Use], kinds: Sequence[OfKind], precision: str) -> Tensor:
    """Each kind with itself, and every two with one another."""
    counts = [u.count for u in uses]
    found = uses[0].tensors[-1].new_zeros(sum(counts), sum(counts), dtype=WIDE)
    # which rows of G each use has
    rows = torch.arange(len(found), device=found.device).split(counts)
    at = [torch.cat([rows[i] for i in which]) for which, _ in kinds]
    for k, (_, own) in enumerate(kinds):
        found[at[k][:, None], at[k]] += _gram_alike(own, precision)
        for j, (_, others) in enumerate(kinds[:k]):
            # G is symmetric: the other block is the transpose
            cross = _cross_gram(own, others, precision)
            found[at[k][:, None], at[j]] += cross
            found[at[j][:, None], at[k]] += cross.T
    return found


def route(uses: Sequence[Use]) -> str:
    """The route that `gram` takes for these uses, in words."""
    if not aligned(uses):
        return "explicit rows"
    return " + ".join(_route_alike(own) for _, own in _apart(uses))


def only(kind: type[U], uses: Sequence[Use]) -> list[U]:
    """The uses if all are of this kind (convolutions: of one geometry), else nothing."""
    found = [u for u in uses if isinstance(u, kind)]
    is_one_kind = len(set(map(_kind, found))) == 1
    return found if len(found) == len(uses) and is_one_kind else []


def _kind(use: Use) -> Kind:
    return use.geometry if isinstance(use, Conv) else type(use)


def _apart(uses: Sequence[Use]) -> list[OfKind]:
    """The parts of aligned uses, kind by kind: which of the uses have any, and those.

    Kinds are told apart where they have a product of their own. Others are one kind, that of
    explicit rows: whatever they meet, they are formed.
    """
    formed = must_be_formed(uses)
    found: dict[Kind, dict[int, list[Use]]] = {}
    for i, use in enumerate(uses):
        for part in parts_of(use):
            kind = Dense if formed and not isinstance(part, Common) else _kind(part)
            found.setdefault(kind, {}).setdefault(i, []).append(part)
    return [(list(of_use), [sum_of(p) for p in of_use.values()]) for of_use in found.values()]


def must_be_formed(uses: Sequence[Use]) -> bool:
    """Whether kinds meet that have no op in common but that of explicit rows."""
    # directions in common meet any other kind by `inner`
    kinds = {_kind(part) for use in uses for part in parts_of(use)} - {Common}
    if len(kinds) <= 1:
        return False
    is_table = kinds <= {Outer, Gather} and len(uses[0].shape) == 2
    return not is_table or _rows_pay(uses)


def _rows_pay(uses: Sequence[Use]) -> bool:
    """Whether the rows of a table, multiplied and looked up, are cheaper than its factors."""
    left, right, index, values = [], [], [], []
    for use in uses:
        for part in parts_of(use):
            if isinstance(part, Outer):
                left.append(part.left)
                right.append(part.right)
            elif isinstance(part, Gather):
                index.append(part.index)
                values.append(part.values)
    return op.rows_pay_for_table(left, right, index, values)


def work(use: Use) -> float:
    """What the Gram of the rows of one use costs, in the unit of `Prices`; an estimate."""
    found = 0.0
    for part in parts_of(use):
        kind = type(part)
        found += _WORK[kind](part) if kind in _WORK else 2.0 * part.count**2 * prod(part.shape)
    return found


def _outer_work(use: Outer) -> float:
    if use.left.shape[1] == 1:
        # (b ⊗ a, b' ⊗ a') = ⟨b, b'⟩ ⟨a, a'⟩
        return 2.0 * use.count**2 * sum(use.shape)
    cost = op.outer_cost([use.left], [use.right])
    return min(cost.ghost, cost.direct)


def _gather_work(use: Gather) -> float:
    # entries that are not looked up are not formed
    occurring = min(use.shape[0], use.index.numel())
    price = op.prices(use.values.device)
    return (price.row_product * use.count + price.row) * use.count * occurring * use.unit


def _conv_work(use: Conv) -> float:
    cost = op.conv_cost([use.x], [use.b], use.geometry)
    return min(cost.ghost, cost.direct)


# ---- uses of one kind ----------------------------------------------------------------------------


def _gram_alike(uses: Sequence[Use], precision: str, into: Into = ()) -> Tensor:
    """`gram` of aligned uses of one kind."""
    kind = type(uses[0])
    if kind in _FORMING and only(kind, uses):
        return _FORMING[kind](uses, precision, into)
    if kind in _GRAMS and only(kind, uses):
        return summed_gram(_GRAMS[kind](uses, precision), into)
    return _tiled_gram(uses, 0, into)


def _outer_gram(uses: Sequence[Outer], precision: str, into: Into) -> Tensor:
    return op.outer_gram([u.left for u in uses], [u.right for u in uses], precision, into)


def _conv_gram(uses: Sequence[Conv], precision: str, into: Into) -> Tensor:
    geometry = uses[0].geometry
    return op.conv_gram([u.x for u in uses], [u.b for u in uses], geometry, precision, into)


def _gather_gram(uses: Sequence[Gather], precision: str) -> Tensor:
    return op.gather_gram([u.index for u in uses], [u.values for u in uses], precision)


def _common_gram(uses: Sequence[Common], precision: str) -> Tensor:
    """S (D Dᵀ) Sᵀ, the scales S block-diagonal over the uses."""
    # J = S D: a row of one use is made of that use's directions only
    scale = torch.block_diag(*(u.scale.to(WIDE) for u in uses))
    return scale @ op.row_gram([u.flat for u in uses]) @ scale.T


def _stacked_gram(uses: Sequence[Stacked], precision: str) -> Tensor:
    """The sum over blocks, each of the rows that have it."""
    counts = [u.count for u in uses]
    found = uses[0].tensors[0].new_zeros(sum(counts), sum(counts), dtype=WIDE)
    rows = torch.arange(len(found), device=found.device).split(counts)
    for which, parts in by_block(uses).values():
        at = torch.cat([rows[i] for i in which])
        found[at[:, None], at] += gram(parts, precision)
    return found


def _tiled_gram(uses: Sequence[Use], known: int = 0, into: Into = ()) -> Tensor:
    """`gram` of aligned uses of any kinds, a tile of explicit rows at a time."""
    R, width = sum(u.count for u in uses), prod(uses[0].shape)
    # every use must be cut at whole units of its own
    unit = lcm(*(u.unit for u in uses))
    # on a GPU a tile is bounded by memory, not by a cache
    device = uses[0].tensors[-1].device
    tile = ROWS_IN_CACHE if device.type == "cpu" else buffer(device)
    step = max(tile // max(R * unit, 1), 1) * unit
    met = rows_of_gram(into, R)
    found = uses[0].tensors[-1].new_zeros(met, met, dtype=WIDE)
    for start in range(0, width, max(step, 1)):
        stop = min(start + step, width)
        rows = [u.columns(start, stop) for u in uses]
        found += op.row_gram(summed_rows(rows, into), known)
    return found


# Ops that form rows, and sum them where they do.
_FORMING: dict[type[Use], Callable[[Sequence[Any], str, Into], Tensor]] = {
    Outer: _outer_gram,
    Conv: _conv_gram,
}
_GRAMS: dict[type[Use], Callable[[Sequence[Any], str], Tensor]] = {
    Gather: _gather_gram,
    Common: _common_gram,
    Stacked: _stacked_gram,
}

_WORK: dict[type[Use], Callable[[Any], float]] = {
    Outer: _outer_work,
    Conv: _conv_work,
    Gather: _gather_work,
}

# ---- two kinds -----------------------------------------------------------------------------------


def _cross_gram(uses: Sequence[Use], others: Sequence[Use], precision: str) -> Tensor:
    """The rows' inner products with those of aligned uses of another kind, float64 `[R, R']`."""
    if commons := only(Common, uses):
        return torch.cat([_along(u, others) for u in commons])
    outers, gathers = only(Outer, uses), only(Gather, others)
    if not outers or not gathers:
        return _cross_gram(others, uses, precision).T
    return op.outer_gather(
        [u.left for u in outers],
        [u.right for u in outers],
        [u.index for u in gathers],
        [u.values for u in gathers],
        precision,
    )


def _along(common: Common, others: Sequence[Use]) -> Tensor:
    """Inner products of rows along directions with other rows: S (D J'ᵀ)."""
    # directions are few, so rows of the others need not be formed
    inner = [torch.cat([u.inner(d.to(WIDE)) for u in others]) for d in common.direction]
    return common.scale.to(WIDE) @ torch.stack(inner)


# ---- in words ------------------------------------------------------------------------------------


def _route_alike(uses: Sequence[Use]) -> str:
    kind = type(uses[0])
    if kind in _ROUTES and only(kind, uses):
        return _ROUTES[kind](uses)
    return "explicit rows"


def _outer_route(uses: Sequence[Outer]) -> str:
    return "outer, " + op.outer_route([u.left for u in uses], [u.right for u in uses])


def _conv_route(uses: Sequence[Conv]) -> str:
    geometry = uses[0].geometry
    return "conv, " + op.conv_route([u.x for u in uses], [u.b for u in uses], geometry)


def _stacked_route(uses: Sequence[Stacked]) -> str:
    routes = {route(parts) for _, parts in by_block(uses).values()}
    return "blocks: " + ", ".join(sorted(routes))


_ROUTES: dict[type[Use], Callable[[Sequence[Any]], str]] = {
    Outer: _outer_route,
    Conv: _conv_route,
    Gather: lambda uses: "entries that occur",
    Common: lambda uses: "directions in common",
    Stacked: _stacked_route,
}

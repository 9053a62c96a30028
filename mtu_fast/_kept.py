"""What rows kept across steps share, whatever they are kept for: how they are held, and a step with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from mtu_fast._arguments import MOST, check_dtype, check_flag, check_share, check_whole
from mtu_fast._ops.gram import row_gram
from mtu_fast._ops.gram_schmidt import orthonormalize
from mtu_fast._rows.update import Update
from mtu_fast.methods import Method, Roles
from mtu_fast.methods._undo import undone
from mtu_fast.methods.base import dependence_tolerance
from mtu_fast.methods.interference import STALE, basis_weights
from mtu_fast.rows import Rows, cat


@dataclass(frozen=True)
class Form:
    """Rows, or an orthonormal basis of them, and of what precision.

    Attributes:
        owner: what errors call whose it is.
        size: rows to hold; None for the default.
        every: steps between two batches that are taken in.
        basis: whether a basis stands for the rows.
        rank: the most dimensions of the basis.
        energy: share of Σσ² of the rows that the basis must hold.
        dtype: of what is explicit; None for that of the parameters.
    """

    owner: str
    size: int | None
    every: int
    basis: bool
    rank: int | None
    energy: float
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        owner = self.owner
        check_flag(f"{owner}: basis", self.basis)
        check_whole(f"{owner}: every", self.every, 1, MOST)
        for name in ("size", "rank"):
            if getattr(self, name) is not None:
                check_whole(f"{owner}: {name}", getattr(self, name), 1, MOST)
        check_share(f"{owner}: energy", self.energy)
        if self.dtype is not None:
            check_dtype(f"{owner}: dtype", self.dtype)
        if not self.basis and (self.rank, self.energy) != (None, 1.0):
            raise ValueError(f"{owner}: rank and energy are those of a basis; pass basis=True too.")


class Keeper(Protocol):
    """Rows of earlier steps: joined to those of a step, of which it keeps some."""

    def join(self, rows: Rows) -> Rows: ...

    def look(self, rows: Rows) -> Callable[[Update], Any]:
        """What is to be held after a step with these rows, which the step uses up, once its update is known."""
        ...

    held: Any


def step(rows: Rows, method: Method, *kept: Keeper | None) -> Update:
    """The update of the rows joined to what is kept, then rows of the step are; on an error, of either, nothing is."""
    keepers = [keeper for keeper in kept if keeper is not None]
    joined = rows
    for keeper in keepers:
        joined = keeper.join(joined)
    # before the update, which uses the rows up
    pending = [keeper.look(rows) for keeper in keepers]
    with undone(method):
        planned = joined.planned(method, check=not keepers)
        held = [after(planned.update) for after in pending]
    # nothing may fail from here on but hooks of the user's, which come last
    planned.write()
    for keeper, new in zip(keepers, held, strict=True):
        keeper.held = new  # finite rows: the Gram and the update are
    planned.run_hooks()
    return planned.update


def orthonormal(
    batches: Sequence[Rows], rank: int | None, energy: float, dtype: torch.dtype | None
) -> tuple[dict[str, Any], int]:
    """An orthonormal basis of all rows together, {name of a parameter: `[K, *shape]`} in `dtype`, and K.

    Args:
        batches: the rows.
        rank: the most dimensions.
        energy: share of Σσ² to be held.
        dtype: of the basis; None for that of the parameters.

    Returns:
        K explicit vectors.
    """
    rows = cat(*batches)
    J = rows.jacobian()
    flat = [part[..., None].flatten(1) for part in J.values()]  # a number has rows [K, 1]
    # float64 whatever the rows are in
    G = torch.stack([row_gram([part]) for part in flat]).sum(0)
    W, dimension = basis_weights(G, dependence_tolerance(rows.roles.dtype), energy, rank)
    # columns that are not zero; of rows that all are, one vector of zeros, which spans as little
    order = W.square().sum(0).argsort(descending=True)[: max(int(dimension), 1)]
    # Q = Wᵀ J with Wᵀ G W = 1, `[K, *shape]` for each parameter
    vectors = [torch.tensordot(W.T[order].to(part.dtype), part, 1) for part in J.values()]
    # what that rounded: one round, since they are nearly orthonormal; all of it in one precision
    finest = reduce(torch.promote_types, [v.dtype for v in vectors])
    Q, _ = orthonormalize([v.to(finest) for v in vectors], STALE)
    basis = {p: q.to(dtype or v.dtype) for p, q, v in zip(J, Q, vectors, strict=True)}
    named = {name: basis[p] for name, p in rows.parameters.items() if p in basis}
    return named, len(order)


def best(scores: Tensor, roles: Roles, size: int, per_task: bool) -> Tensor:
    """Indices of the `size` rows of the largest scores, in their order; as many of each task that has some."""
    if not per_task:
        return scores.topk(min(size, len(scores))).indices.sort().values
    of_tasks = [(roles.task == t).nonzero().flatten() for t in range(len(roles.tasks))]
    some = [mine for mine in of_tasks if len(mine)]
    found = []
    for mine in some:
        most = min(max(size // len(some), 1), len(mine))
        found.append(mine[scores[mine].topk(most).indices])
    each = torch.cat(found)
    best = scores[each].topk(min(size, len(each))).indices  # where tasks are more than rows to hold
    return each[best].sort().values

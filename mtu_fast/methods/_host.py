"""One matrix at a time on the CPU, in numpy: an operation on a small one takes a microsecond, and several in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtu_fast._later import is_host
from mtu_fast._ops._host_linalg import Array, Mask, cholesky
from mtu_fast.methods.roles import Roles

INDEPENDENT = 1e-3  # least residual length of a unit row on those before it
SIGN = np.array([1.0, -1.0, 0.0, 0.0, 0.0])  # of RETAIN and FORGET rows, and all others


@dataclass(frozen=True)
class LiveRows:
    """The rows that take part and are not zero, divided by their lengths; no other row is in the matrices.

    Attributes:
        E: [n, n] cosines with forget rows negated.
        length: [n].
        live: [R] bool, which of all rows these n are.
        zero: [R] bool, the rows that take part and are zero.
        dependent: whether E is singular, or too near to it for weights to be unique.
    """

    E: Array
    length: Array
    live: Mask
    zero: Mask
    dependent: bool

    @property
    def share(self) -> Array:
        """1/T on the rows that take part, zero ones included, 0 elsewhere: [R]."""
        taking = self.live | self.zero
        return taking / max(int(np.count_nonzero(taking)), 1)


Solve = Callable[[LiveRows], Array | None]


def solved(
    G: Tensor,
    roles: Roles,
    solve: Solve,
    otherwise: Callable[[Tensor], Tensor],
) -> Tensor:
    """Weights [..., R] of each matrix by `solve` on the CPU; by `otherwise` elsewhere, and where it gives None.

    Args:
        G: [..., R, R] float64.
        roles: what the R rows are.
        solve: unit rows to the weights [R] of signed rows.
        otherwise: Gram matrices [..., R, R] to weights [..., R].

    Returns:
        Weights, those of forget rows turned back.
    """
    if not len(roles):
        return G.new_zeros(G.shape[:-1])
    if not is_host(G.device):
        return otherwise(G)
    sign = SIGN[roles.kind.numpy()]
    # the common case, without the bookkeeping of a batch
    if G.ndim == 2:
        found = _one(G.detach().numpy(), sign, solve)
        return otherwise(G) if found is None else torch.from_numpy(found)
    matrices = G.detach().reshape(-1, *G.shape[-2:])
    weights = np.zeros(matrices.shape[:2])
    left = []
    for i, matrix in enumerate(matrices.numpy()):
        found = _one(matrix, sign, solve)
        if found is None:
            left.append(i)
        else:
            weights[i] = found
    if left:  # all at once, as one batch
        weights[left] = otherwise(matrices[left]).numpy()
    return torch.from_numpy(weights).reshape(G.shape[:-1])


def _one(G: Array, sign: Array, solve: Solve) -> Array | None:
    """The weights [R] of one matrix [R, R]; None where that is not finite, or `solve` finds none."""
    rows = live_rows(G, sign)
    if rows is None:
        return None
    try:
        with np.errstate(all="ignore"):  # what is not finite is no solution, and solvers say so
            found = solve(rows)
    except np.linalg.LinAlgError:
        return None
    return None if found is None else sign * found


def live_rows(G: Array, sign: Array) -> LiveRows | None:
    """Unit rows from their Gram matrix [R, R] and signs [R]; None where one is not finite."""
    squares = G.diagonal()
    if not np.isfinite(squares).all():
        return None
    taking = sign != 0
    live = taking & (squares > 0)
    if not live.all():
        at = live.nonzero()[0]
        G, squares, sign = G[at[:, None], at], squares[at], sign[at]
    length = np.sqrt(squares)
    unit = sign / length
    # signed cosines, of which the diagonal is 1
    E = G * unit * unit[:, None]
    if not np.isfinite(E).all():
        return None
    return LiveRows(E, length, live, taking & ~live, not _independent(E))


def _independent(E: Array) -> bool:
    # its diagonal holds what each unit row has beside those before it
    L, failed = cholesky(E)
    return not failed and bool((L.diagonal() > INDEPENDENT).all())

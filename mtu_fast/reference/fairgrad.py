"""FairGrad on explicit gradient vectors, one weight at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from torch import Tensor

from mtu_fast.reference.base import Reference, Sides

SWEEPS = 5000


def fair_weights(gradients: Tensor, a: float, tol: float = 1e-13) -> list[float] | None:
    """w > 0 with <g_i, Σ_j w_j g_j> = w_i^(-1/a) for all rows of [R, P]; None where sweeps do not settle.

    Each equation in turn is solved for its own w_i: ‖g_i‖² w + rest = w^(-1/a), whose left side
    rises and whose right side falls. That is coordinate descent on the convex function that the
    equations are the gradient of.
    """
    G = (gradients @ gradients.t()).tolist()
    # where g_i is alone: ‖g_i‖² w = w^(-1/a)
    w = [row[i] ** (-a / (1 + a)) for i, row in enumerate(G)]
    for _sweep in range(SWEEPS):
        before = list(w)
        for i, row in enumerate(G):
            others = [g * x for g, x in zip(row, w, strict=True)]
            others[i] = 0.0
            w[i] = _root(row[i], sum(others), 1 / a)
        # a sweep that moves nothing is the solution: the function is convex
        if all(abs(new - old) <= tol * new for new, old in zip(w, before, strict=True)):
            return w
    return None


def _root(square: float, rest: float, q: float) -> float:
    """The w > 0 with square · w + rest = w^(-q), by bisection of log w."""
    low, high = -300.0, 300.0
    for _halving in range(80):
        middle = (low + high) / 2
        # w spans decades, so its logarithm is halved
        w = float(10**middle)
        # compared by logarithms, in which w^(-q) has no overflow
        if square * w + rest > 0 and log(square * w + rest) > -q * middle * log(10):
            high = middle
        else:
            low = middle
    return float(10**high)


def fairgrad(gradients: Tensor, a: float = 2.0) -> Tensor:
    """Σ w_i g_i with the fair w of the rows that are not zero; zero where there is none: [R, P] -> [P].

    Source: arXiv 2402.15638, equation 4.
    """
    rows = gradients[gradients.norm(dim=1) > 0]
    w = fair_weights(rows, a)
    if w is None:
        return gradients.new_zeros(gradients.shape[1])
    return rows.t() @ rows.new_tensor(w)


@dataclass(frozen=True)
class FairGrad(Reference, called="fairgrad"):
    """`fairgrad` of the signed mean rows."""

    a: float = 2.0

    def direction(self, sides: Sides) -> Tensor:
        return fairgrad(sides.signed_matrix(), self.a)

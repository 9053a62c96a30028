"""GradVac on explicit gradient vectors, as the paper's loop."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mtu_fast.reference.base import Reference, Sides
from mtu_fast.reference.pcgrad import visited

Targets = MutableMapping[tuple[Any, Any], float]


def gradvac(
    gradients: Tensor,
    targets: Targets | None = None,
    beta: float = 0.01,
    names: Sequence[Any] | None = None,
    orders: Sequence[Sequence[int]] | None = None,
    tol: float = 1e-7,
) -> Tensor:
    """Σ_i g_i after g_i is raised along every g_j to the target of their cosine, one j after another.

    Args:
        gradients: [R, P], one gradient per task; a gradient to be ascended is negated by the
            caller.
        targets: {(name of i, name of j): target cosine}, 0 where missing; written to.
        beta: share by which a target moves towards the cosine met.
        names: of the rows; their numbers by default.
        orders: for every i the order of its j; increasing by default.
        tol: a g_i of which a smaller share is left is zero; a target whose sine is smaller is out
            of reach.

    Returns:
        The update direction [P].

    Source: arXiv 2010.05874, algorithm 1.
    """
    R = len(gradients)
    known: Targets = {} if targets is None else targets
    named = names or range(R)
    total = gradients.new_zeros(gradients.shape[1])
    for i in range(R):
        g = gradients[i].clone()
        for j in visited(R, i, orders):
            length, other = g.norm(), gradients[j].norm()
            if other == 0 or length <= tol * gradients[i].norm():
                continue
            pair = (named[i], named[j])
            wanted = known.get(pair, 0.0)
            cosine = float((g @ gradients[j] / (length * other)).clamp(-1, 1))
            # sines of the angle that is and of the one wanted
            sine, reach = (1 - cosine**2) ** 0.5, (1 - wanted**2) ** 0.5
            if cosine < wanted and reach > tol:
                # by the law of sines: g + step · g_j has the cosine wanted
                step = length * (wanted * sine - cosine * reach) / (other * reach)
                g = g + step * gradients[j]
            # an exponential moving average of the cosines met
            known[pair] = wanted + beta * (cosine - wanted)
        total = total + g
    return total


@dataclass(frozen=True)
class GradVac(Reference, called="gradvac"):
    """`gradvac` of the signed mean rows; `targets`, a dict, is kept by the caller from step to step."""

    beta: float = 0.01
    targets: Targets | None = None
    orders: Sequence[Sequence[int]] | None = None
    tol: float = 1e-7

    def direction(self, sides: Sides) -> Tensor:
        means = sides.signed_means()
        return gradvac(
            sides.signed_matrix(), self.targets, self.beta, list(means), self.orders, self.tol
        )

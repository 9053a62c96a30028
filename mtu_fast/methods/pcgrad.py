"""PCGrad: remove from every row the part that conflicts with another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast._arguments import check_generator
from mtu_fast.methods._gram import signed_gram
from mtu_fast.methods._orders import visiting_orders
from mtu_fast.methods.base import Method
from mtu_fast.methods.roles import Roles, signs


@dataclass(frozen=True)
class PCGrad(Method):
    """w = Σ_i c_i, where c_i = e_i, and for every j ≠ i in order: c_i[j] -= min(0, (G c_i)_j) / G_jj.

    Row i loses its component along each row j that it conflicts with; the projected rows are
    summed. Forget rows enter negated (their gradient is to be ascended) and their weights come back
    negated; subspace rows take no part. A zero row conflicts with none. Meant for one mean row per
    (kind, task). Runs on the device of G without waiting for it.

    Args:
        generator: draws for every row i the order of its j, at each call; None for increasing j.
            One order serves all matrices of a batch.

    Raises:
        TypeError: `generator` is not a torch.Generator.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782, algorithm 1.
    """

    generator: torch.Generator | None = None
    per = "task"

    def __post_init__(self) -> None:
        check_generator("PCGrad: generator", self.generator)

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G, sign = signed_gram("PCGrad", G, roles)
        orders = visiting_orders(len(roles), self.generator).to(G.device)
        return sign * _project_all(G, orders).sum(-2)

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1 on retain rows, -1 on forget rows, [R]: the weights where nothing conflicts."""
        return signs(roles)


def _project_all(G: Tensor, orders: Tensor) -> Tensor:
    """C [..., R, R]: row i holds the coefficients of the projected row i; all i take their step at once."""
    C = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand(G.shape)
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    for j in orders.unbind(1):  # j [R]: whom each row meets
        # ⟨projected row i, g_j⟩; g_j itself is never projected
        conflict = (C * G[..., j, :]).sum(-1).clamp(max=0.0)  # (G c_i)_j
        norm = diagonal[..., j]
        step = torch.where(norm > 0, conflict / norm, 0.0)
        at = j[:, None].expand(*step.shape, 1)
        C = C.scatter_add(-1, at, -step[..., None])
    return C

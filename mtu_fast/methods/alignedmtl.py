"""Aligned-MTL: the rows replaced by the nearest orthogonal ones, all as long as the shortest principal direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtu_fast._arguments import check_positive
from mtu_fast.methods._gram import signed_gram
from mtu_fast.methods.base import Method, dependence_tolerance
from mtu_fast.methods.roles import Roles, equal_shares, signs


@dataclass(frozen=True)
class AlignedMTL(Method):
    """w = √λ_min V Λ^(-1/2) Vᵀ p with G = V Λ Vᵀ: J^T w = σ_min · Σ_i p_i (A Bᵀ)_i where J = A Σ Bᵀ.

    λ_min is the smallest eigenvalue that counts: singular values of J below the dependence
    tolerance times the largest do not (our reading; TorchJD draws the line at R eps λ_max), and
    their directions are left out. Forget rows enter negated and their weights come back negated;
    subspace and zero rows take no part. Homogeneous of degree 0: w does not depend on the common
    scale of the losses. Meant for one mean row per (kind, task). `torch.linalg.eigh` looks at its
    own status once per call, which is the one wait for a GPU.

    Args:
        preference: {task: weight}, p_i of the task's rows, retain and forget alike; None for 1 /
            (number of rows that take part).

    Raises:
        TypeError: `preference` is not a mapping to numbers.
        ValueError: a weight is negative or not finite.

    Source: Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023,
    algorithm 1.
    """

    per = "task"

    preference: Mapping[str, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.preference is None:
            return
        if not isinstance(self.preference, Mapping):
            raise TypeError(
                f"AlignedMTL: preference is {type(self.preference).__name__}, expected {{task: weight}} or None; rows "
                "are known by the names of their tasks."
            )
        own = dict(self.preference)  # a later change of the caller's is none of ours
        object.__setattr__(self, "preference", own)
        for task, weight in own.items():
            check_positive(f"AlignedMTL: preference[{task!r}]", weight, zero=True)

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles`, or a task without a preference, a ValueError.
        """
        G, sign = signed_gram("AlignedMTL", G, roles)
        if not len(roles):
            return G.new_zeros(G.shape[:-1])
        # J = A Σ Bᵀ has G = A Σ² Aᵀ: V is A, and the eigenvalues are the squares of Σ
        values, V = torch.linalg.eigh(G)  # [..., R], [..., R, R]
        largest = values[..., -1:].clamp(min=0.0)
        counts = values > dependence_tolerance(roles.dtype) ** 2 * largest
        lowest = torch.where(counts, values, torch.inf).amin(-1, keepdim=True)
        ratio = torch.where(counts, (lowest / values).sqrt(), 0.0)
        p = sign * self.outside(roles)
        # V diag(ratio) Vᵀ p, without a matrix
        return sign * (V * (ratio * (p @ V))[..., None, :]).sum(-1)

    def outside(self, roles: Roles) -> Tensor:
        """Weights p on retain rows, -p on forget rows, [R]: the weights before the alignment."""
        if self.preference is None:
            return equal_shares(roles)
        missing = [task for task in roles.tasks if task not in self.preference]
        if missing:
            named = ", ".join(map(str, self.preference)) or "no task"
            raise ValueError(
                f"AlignedMTL: preference names {named}, but there are rows of {', '.join(map(str, missing))}; give "
                "every task a weight."
            )
        sign = signs(roles)
        wanted = sign.new_tensor([self.preference[task] for task in roles.tasks])
        return sign * wanted[roles.task]

"""Aligned-MTL: the rows replaced by the nearest orthogonal ones, all as long as the shortest principal direction."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor

from mtu_fast.methods.base import Roles, check_gram, dependence_tolerance
from mtu_fast.methods.signed import signed_gram, signs


class AlignedMTL:
    """w = √λ_min V Λ^(-1/2) Vᵀ p with G = V Λ Vᵀ: J^T w = σ_min · Σ_i p_i (A Bᵀ)_i where J = A Σ Bᵀ.

    λ_min is the smallest eigenvalue that counts: singular values of J below the dependence
    tolerance times the largest do not (our reading; TorchJD draws the line at R eps λ_max), and
    their directions are left out. Forget rows enter negated and their weights come back negated;
    subspace and zero rows take no part. Homogeneous of degree 0: w does not depend on the common
    scale of the losses. Meant for one mean row per (kind, task). `torch.linalg.eigh` looks at its
    own status once a call, which is the one wait for a GPU.

    Args:
        preference: {task: weight}, p_i of the task's rows, retain and forget alike; None for 1 /
            (number of rows that take part).

    Raises:
        TypeError: `preference` is not a mapping.
        ValueError: a weight is negative or not finite.

    Source: Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023,
    algorithm 1.
    """

    per = "task"
    granularity = "global"
    needs_gram = True

    def __init__(self, preference: Mapping[str, float] | None = None) -> None:
        if preference is not None and not isinstance(preference, Mapping):
            raise TypeError(
                f"AlignedMTL: preference is {type(preference).__name__}, expected {{task: weight}} or None; rows are "
                "known by the names of their tasks."
            )
        for task, weight in (preference or {}).items():
            if not (isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"AlignedMTL: preference[{task!r}] is {weight}, expected a finite weight, at least 0."
                )
        self.preference = None if preference is None else dict(preference)

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles`, or a task without a preference, a ValueError.
        """
        if not len(roles):
            return check_gram("AlignedMTL", G, roles).diagonal(dim1=-2, dim2=-1)
        G, sign = signed_gram("AlignedMTL", G, roles)
        values, V = torch.linalg.eigh(G)  # [..., R], [..., R, R]
        counts = values > dependence_tolerance(roles.dtype) ** 2 * values[..., -1:].clamp(min=0.0)
        lowest = torch.where(counts, values, torch.inf).amin(-1, keepdim=True)
        ratio = torch.where(counts, (lowest / values).sqrt(), torch.zeros_like(values))
        p = sign * self.outside(roles)
        return sign * (V * (ratio * (p @ V))[..., None, :]).sum(-1)

    def outside(self, roles: Roles) -> Tensor:
        """Weights p on retain rows, -p on forget rows, [R]: the weights before the alignment."""
        sign = signs(roles)
        if self.preference is None:
            return sign / sign.abs().sum().clamp(min=1.0)
        missing = [task for task in roles.tasks if task not in self.preference]
        if missing:
            raise ValueError(
                f"AlignedMTL: preference names {', '.join(self.preference) or 'no task'}, but there are rows of "
                f"{', '.join(missing)}; give every task a weight."
            )
        return sign * sign.new_tensor([self.preference[task] for task in roles.tasks])[roles.task]

    def __repr__(self) -> str:
        return f"AlignedMTL(preference={self.preference})"

"""The truth: one ordinary backward per row on the recorded graph, and how far something is from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tests.helpers.measured import Measured


def flat_losses(losses: Mapping[str, Tensor] | Tensor) -> Tensor:
    """All losses in one vector [R], task-major."""
    return torch.cat(list(losses.values())) if isinstance(losses, Mapping) else losses


def jacobian(losses: Mapping[str, Tensor] | Tensor, params: Iterable[Tensor]) -> dict[int, Tensor]:
    """J by rows: {index of the parameter: [R, *shape]}; zeros where a row does not reach the parameter.

    The graph is kept, so that what is compared sees the same dropout masks and the same routing.
    """
    wanted = list(params)
    rows: list[Sequence[Tensor | None]] = []
    for loss in flat_losses(losses):
        rows.append(torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True))
    return {i: torch.stack([_dense(row[i], p) for row in rows]) for i, p in enumerate(wanted)}


def _dense(g: Tensor | None, p: Tensor) -> Tensor:
    if g is None:
        return torch.zeros_like(p)
    return g.to_dense() if g.is_sparse else g


def matrix(J: Mapping[int, Tensor]) -> Tensor:
    """J as one float64 matrix [R, P]."""
    return torch.cat([rows.reshape(len(rows), -1).double() for rows in J.values()], 1)


def gram_truth(J: Mapping[int, Tensor] | Tensor) -> Tensor:
    """J Jᵀ in float64, [R, R]."""
    rows = J.double() if isinstance(J, Tensor) else matrix(J)
    return rows @ rows.t()


def combine_truth(J: Mapping[int, Tensor], w: Tensor) -> dict[int, Tensor]:
    """Jᵀ w per parameter, in float64."""
    return {i: torch.einsum("r,r...->...", w.double(), rows.double()) for i, rows in J.items()}


def relative_error(found: Tensor, truth: Tensor) -> float:
    """‖found - truth‖ / ‖truth‖ (Frobenius); the plain norm of `found` where the truth is zero."""
    if found.shape != truth.shape:
        raise ValueError(
            f"found has shape {tuple(found.shape)}, the truth {tuple(truth.shape)}; they must agree"
        )
    scale = truth.double().norm()
    gap = (found.double() - truth.double()).norm()
    return Measured(gap / scale if scale > 0 else gap)

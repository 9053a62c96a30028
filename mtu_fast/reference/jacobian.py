"""Per-sample gradients, the slow way: one backward per loss value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def jacobian(losses: Tensor | Mapping[str, Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """J[r] = d loss_r / d params: for every parameter a stack [R, *shape], rows task-major.

    Args:
        losses: unreduced losses [N], or {task: [N]}.
        params: P parameters in some number of tensors.

    Returns:
        One tensor [R, *shape] for each parameter; zeros where a loss does not reach it. The graph
        is kept.
    """
    values = torch.cat(list(losses.values())) if isinstance(losses, Mapping) else losses
    stacks = [p.new_zeros(len(values), *p.shape) for p in params]
    for r, loss in enumerate(values):
        # one ordinary backward a row: what a row is by definition
        row = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        for stack, g in zip(stacks, row, strict=True):
            if g is not None:
                stack[r] = g.to_dense() if g.is_sparse else g
    return stacks


def flatten(stacks: Sequence[Tensor]) -> Tensor:
    """[R, *shape] for each parameter to one matrix [R, P]."""
    return torch.cat([stack.reshape(len(stack), -1) for stack in stacks], 1)


def unflatten(d: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """A vector [P] to tensors shaped as the parameters."""
    parts = d.split([p.numel() for p in params])
    return [part.view(p.shape) for part, p in zip(parts, params, strict=True)]

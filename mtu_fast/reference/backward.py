"""The slow drop-in: losses to `.grad`, with every per-sample gradient in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtu_fast.reference.base import Reference, Rows, Sides, made
from mtu_fast.reference.jacobian import flatten, jacobian, unflatten

Forget = bool | Tensor | Mapping[str, Tensor] | None


def backward(
    params: Iterable[Tensor],
    losses: Tensor | Mapping[str, Tensor],
    method: str = "orthograd",
    *,
    forget: Forget = None,
    outside: Iterable[Tensor] = (),
    blocks: Sequence[Sequence[int]] | None = None,
    subspace: Tensor | None = None,
    **options: Any,
) -> None:
    """.grad += the direction of `method`, from the Jacobian [R, P] of the losses, built one backward at a time.

    Args:
        params: the shared parameters, on which the method acts.
        losses: unreduced losses, {task: [N]} or [N].
        method: a name in `reference.METHODS`: "orthograd", "pcgrad", "mean", "graddiff", "ascent",
            ...
        forget: None, True, a mask [N] for all tasks, or {task: mask [N]}.
        outside: parameters that get the gradient of the plain weighted losses (heads).
        blocks: lists of indices into `params`, each treated on its own (layers, tensors); all
            together by default.
        subspace: rows of earlier batches [K, P], as `flatten(jacobian(...))` over all `params`
            gives them.
        **options: of the method: alpha (weight of the retain gradient), tol (length of a unit row's
            residual below which it is dependent), ...

    Raises:
        ValueError: `method` is unknown.
        TypeError: the method has no such option.
    """
    known = made(method, options)
    shared = list(params)
    if isinstance(losses, Tensor):
        losses = {"loss": losses}
    masks = {task: _mask(forget, task, loss) for task, loss in losses.items()}
    _add_outside(list(outside), _weighted(known, losses, masks))
    stacks = jacobian(losses, shared)
    kept = [] if subspace is None else _stacked(subspace, shared)
    for block in blocks or [range(len(shared))]:
        members = _chosen(shared, block)
        extra = flatten(_chosen(kept, block)) if kept else None
        sides = _sides(flatten(_chosen(stacks, block)), losses, masks, extra)
        _accumulate(members, unflatten(known.direction(sides), members))


def _chosen(tensors: Sequence[Tensor], block: Sequence[int]) -> list[Tensor]:
    """Those of a block."""
    return [tensors[i] for i in block]


def _add_outside(params: Sequence[Tensor], weighted: Tensor) -> None:
    """.grad += the gradient of the weighted losses."""
    if params:
        found = torch.autograd.grad(weighted, params, retain_graph=True, allow_unused=True)
        _accumulate(params, found)


def _sides(J: Tensor, losses: Rows, masks: Rows, subspace: Tensor | None = None) -> Sides:
    """The rows [R, P] of J and their losses, split by role and task."""
    counts = [len(mask) for mask in masks.values()]
    found = Sides({}, {}, {}, {}, subspace)
    for task, rows in zip(masks, J.split(counts), strict=True):
        gone, loss = masks[task], losses[task].detach()
        found.retain[task], found.forget[task] = rows[~gone], rows[gone]
        found.retain_loss[task], found.forget_loss[task] = loss[~gone], loss[gone]
    return found


def _stacked(rows: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Rows [K, P] to a stack [K, *shape] for each parameter."""
    parts = rows.split([p.numel() for p in params], 1)
    return [part.reshape(len(rows), *p.shape) for part, p in zip(parts, params, strict=True)]


def _weighted(known: Reference, losses: Rows, masks: Rows) -> Tensor:
    """The scalar whose gradient the parameters outside get: the method without its surgery."""
    every = torch.cat(list(losses.values()))
    # 0, with a graph: a loss that weighs nothing is reached all the same
    total = every.sum() * 0.0
    # rows without columns: weights may go by losses and counts only
    sides = _sides(every.new_zeros(len(every), 0), losses, masks)
    for task, loss in losses.items():
        kept, gone = loss[~masks[task]], loss[masks[task]]
        up, down = known.outside(sides, task)
        total = total + up * kept.sum() / max(len(kept), 1)
        total = total - down * gone.sum() / max(len(gone), 1)
    return total


def _mask(forget: Forget, task: str, loss: Tensor) -> Tensor:
    """Which samples of the task are forget rows, [N] bool."""
    chosen = forget.get(task, False) if isinstance(forget, Mapping) else forget
    if isinstance(chosen, Tensor):
        return chosen.to(loss.device)
    return torch.full(loss.shape, bool(chosen), dtype=torch.bool, device=loss.device)


def _accumulate(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for p, g in zip(params, gradients, strict=True):
        if g is not None:
            # memory of its own, since autograd may hand out one tensor twice
            g = g.to_dense() if g.is_sparse else g.detach().clone()
            p.grad = g if p.grad is None else p.grad + g

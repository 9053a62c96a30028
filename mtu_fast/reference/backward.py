"""The slow drop-in: losses to `.grad`, with every per-sample gradient in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mtu_fast.reference.graddiff import graddiff
from mtu_fast.reference.jacobian import flatten, jacobian, unflatten
from mtu_fast.reference.mean import mean
from mtu_fast.reference.orthograd import orthograd
from mtu_fast.reference.pcgrad import pcgrad

Forget = bool | Tensor | Mapping[str, Tensor] | None
METHODS = ("orthograd", "pcgrad", "mean", "graddiff", "ascent")


def backward(
    params: Iterable[Tensor],
    losses: Tensor | Mapping[str, Tensor],
    method: str = "orthograd",
    *,
    forget: Forget = None,
    outside: Iterable[Tensor] = (),
    alpha: float = 0.5,
    tol: float = 1e-6,
    blocks: Sequence[Sequence[int]] | None = None,
) -> None:
    """.grad += the direction of `method`, from the Jacobian [R, P] of the losses, built one backward at a time.

    Args:
        params: the shared parameters, on which the method acts.
        losses: unreduced losses, {task: [N]} or [N].
        method: "orthograd", "pcgrad" (mean rows: task by task, retain before forget), "mean", "graddiff" or "ascent".
        forget: None, True, a mask [N] for all tasks, or {task: mask [N]}.
        outside: parameters that get the gradient of the plain weighted losses (heads).
        alpha: weight of the retain gradient, for "orthograd" and "graddiff".
        tol: length of a unit row's residual below which it is dependent, for "orthograd".
        blocks: lists of indices into `params`, each treated on its own (layers, tensors); all together by default.

    Raises:
        ValueError: `method` is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"reference.backward: method is {method!r}, expected one of {', '.join(METHODS)}.")
    shared, heads = list(params), list(outside)
    named = dict(losses) if isinstance(losses, Mapping) else {"loss": losses}
    masks = {task: _mask(forget, task, loss) for task, loss in named.items()}
    if heads:
        weighted = _weighted(named, masks, method, alpha)
        _accumulate(heads, torch.autograd.grad(weighted, heads, retain_graph=True, allow_unused=True))
    stacks = jacobian(named, shared)
    for block in blocks or [range(len(shared))]:
        members = [shared[i] for i in block]
        d = _direction(flatten([stacks[i] for i in block]), masks, method, alpha, tol)
        _accumulate(members, unflatten(d, members))


def _direction(J: Tensor, masks: dict[str, Tensor], method: str, alpha: float, tol: float) -> Tensor:
    """The method on the rows [R, P] of J, split by role and task."""
    by_task = dict(zip(masks, J.split([len(mask) for mask in masks.values()]), strict=True))
    retain = {task: g[~masks[task]] for task, g in by_task.items()}
    forget = {task: g[masks[task]] for task, g in by_task.items()}
    if method == "orthograd":
        return orthograd(retain, forget, alpha, tol)
    if method == "pcgrad":
        signed = [(sign, g[task]) for task in by_task for sign, g in ((1.0, retain), (-1.0, forget))]
        return pcgrad(torch.stack([sign * g.mean(0) for sign, g in signed if len(g)]))
    if method == "mean":
        return mean(by_task)
    return graddiff(retain, forget, 0.0 if method == "ascent" else alpha)


def _weighted(losses: dict[str, Tensor], masks: dict[str, Tensor], method: str, alpha: float) -> Tensor:
    """The scalar whose gradient the parameters outside get: the method without its surgery."""
    if method == "mean":
        return torch.stack([loss.mean() for loss in losses.values()]).sum()
    up = {"pcgrad": 1.0, "ascent": 0.0}.get(method, alpha)
    down = {"pcgrad": 1.0, "ascent": 1.0}.get(method, 1.0 - alpha)
    total = torch.stack([loss.sum() for loss in losses.values()]).sum() * 0.0
    for task, loss in losses.items():
        kept, gone = loss[~masks[task]], loss[masks[task]]
        total = total + up * kept.sum() / max(len(kept), 1) - down * gone.sum() / max(len(gone), 1)
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
            g = g.to_dense() if g.is_sparse else g.detach().clone()
            p.grad = g if p.grad is None else p.grad + g

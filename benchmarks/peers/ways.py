"""Every way to the OrthoGrad step, by name: this library, the packages people use, and plain torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

import mtu_fast as mtu
from benchmarks.measure import SETTLED
from benchmarks.models import Case, cross_entropy
from benchmarks.peers.base import (
    ALPHA,
    Jacobian,
    Peer,
    Steps,
    backward_of_heads,
    from_rows,
    heads,
    means,
    shared_module,
    weights,
    weights_before,
)


def plain(case: Case) -> Steps:
    """The training step that everything is a multiple of."""

    def step() -> None:
        case.model.zero_grad()
        torch.stack([loss.mean() for loss in case.losses().values()]).sum().backward()

    return Steps(None, step)


def ours(case: Case) -> Steps:
    """`Engine.backward`."""
    engine, method = mtu.Engine(case.model, params=case.params.values()), mtu.OrthoGrad(alpha=ALPHA)

    def step() -> None:
        case.model.zero_grad()
        engine.backward(case.losses(), method, forget=case.forget)

    return Steps(lambda: engine.rows(case.losses()).gram(), step)


# ---- torch.func ----------------------------------------------------------------------------------


def vmapped(case: Case) -> Steps:
    """J by torch.func: `vmap(grad)` for one task; for several one vmapped forward, and one ordinary backward a task."""
    return from_rows(
        case, lambda: _quiet(_rows_of_one_task if len(case.labels) == 1 else _rows_of_tasks, case)
    )


def vmapped_qr(case: Case) -> Steps:
    """The same J as one matrix, and the projection by its QR: what the papers' code does."""

    def step() -> None:
        case.model.zero_grad()
        rows = _quiet(_rows_of_one_task if len(case.labels) == 1 else _rows_of_tasks, case)
        J = torch.cat(
            [torch.cat([block.flatten(1) for block in blocks]) for blocks in rows.values()], 1
        )
        forget = case.forget.repeat(len(case.labels))
        r, f = (w.to(J.dtype) @ J for w in means(forget, len(case.labels)))
        Q = torch.linalg.qr(J[~forget].T).Q
        d = ALPHA * r - (1 - ALPHA) * (f - Q @ (Q.T @ f))
        parameters = list(case.params.values())
        for parameter, part in zip(
            parameters, d.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.grad = part.view_as(parameter)

    return Steps(None, step)


def _quiet(rows: Callable[[Case], Jacobian], case: Case) -> Jacobian:
    # attention has no batching rule on CPU: torch loops over the samples, and warns
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return rows(case)


def _losses_of_one(case: Case) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    """(parameters, x, labels [T, *]) -> losses [T] of one sample."""

    def losses(parameters: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        outputs = functional_call(case.model, parameters, (x[None],))
        pairs = zip(case.labels, labels, strict=True)
        return torch.stack([cross_entropy(outputs[task], y[None])[0] for task, y in pairs])

    return losses


def _rows_of_one_task(case: Case) -> Jacobian:
    losses = _losses_of_one(case)
    parameters = {name: p.detach() for name, p in case.params.items()}
    labels = torch.stack(list(case.labels.values()), 1)
    of_one = grad(lambda p, x, y: losses(p, x, y).sum())
    rows: dict[str, Tensor] = vmap(of_one, in_dims=(None, 0, 0))(parameters, case.inputs, labels)
    return {name: [block] for name, block in rows.items()}


def _rows_of_tasks(case: Case) -> Jacobian:
    samples, tasks = len(case.inputs), len(case.labels)
    copies = {
        n: p.detach().expand(samples, *p.shape).requires_grad_() for n, p in case.params.items()
    }
    losses: Tensor = vmap(_losses_of_one(case))(
        copies, case.inputs, torch.stack(list(case.labels.values()), 1)
    )
    backward_of_heads(case, dict(zip(case.labels, losses.T, strict=True)))
    rows = [
        torch.autograd.grad(losses[:, t].sum(), list(copies.values()), retain_graph=t + 1 < tasks)
        for t in range(tasks)
    ]
    return {
        name: list(blocks) for name, blocks in zip(copies, zip(*rows, strict=True), strict=True)
    }


# ---- packages ------------------------------------------------------------------------------------


def torchjd(case: Case) -> Steps:
    """`autogram.Engine.compute_gramian`, then one more backward with the weights."""
    from torchjd import autogram

    engine = autogram.Engine(shared_module(case), batch_dim=0)
    tasks, samples = len(case.labels), len(case.forget)
    R = tasks * samples

    def gramian(losses: Tensor) -> Tensor:
        G: Tensor = engine.compute_gramian(losses)  # rows sample-major
        return G.view(samples, tasks, samples, tasks).permute(1, 0, 3, 2).reshape(R, R)

    def gram() -> Tensor:
        return gramian(torch.stack(list(case.losses().values()), 1))

    def step() -> None:
        case.model.zero_grad()
        by_task = case.losses()
        losses = torch.stack(list(by_task.values()), 1)  # [N, T]
        w = (
            weights(gramian(losses), case.forget.repeat(tasks), tasks)
            .to(losses.dtype)
            .view(tasks, -1)
        )
        backward_of_heads(case, by_task)
        losses.backward(w.T, inputs=list(case.params.values()))

    return Steps(gram, step)


def opacus(case: Case) -> Steps:
    """Per-sample gradients by Opacus's hooks, a forward and backward a task."""
    from opacus import GradSampleModule

    # its hooks rest in eval mode
    GradSampleModule(shared_module(case), loss_reduction="sum").train()
    return from_rows(case, lambda: _hooked_rows(case, "grad_sample", nullcontext))


def backpack(case: Case) -> Steps:
    """Per-sample gradients by BackPACK's BatchGrad, a forward and backward a task."""
    from backpack import backpack as extension
    from backpack import extend
    from backpack.extensions import BatchGrad

    extend(shared_module(case))
    return from_rows(case, lambda: _hooked_rows(case, "grad_batch", lambda: extension(BatchGrad())))


def _hooked_rows(
    case: Case, attribute: str, watching: Callable[[], AbstractContextManager[Any]]
) -> Jacobian:
    """The rows that hooks leave in an attribute of the parameters; their hooks let a graph go after one backward."""
    found: dict[str, list[Tensor]] = {name: [] for name in case.params}
    for t, task in enumerate(case.labels):
        by_task = case.losses()
        if t == 0:
            backward_of_heads(case, by_task)
        with watching():
            by_task[task].sum().backward(inputs=list(case.params.values()))
        for name, p in case.params.items():
            found[name].append(_taken(p, attribute))
    return found


def _taken(parameter: Tensor, name: str) -> Tensor:
    """The package's per-sample gradients of a parameter, which then lets go of them.

    Raises:
        RuntimeError: there are none.
    """
    rows = getattr(parameter, name, None)
    if rows is None:
        raise RuntimeError(f"no {name} for a parameter of shape {tuple(parameter.shape)}")
    setattr(parameter, name, None)
    found: Tensor = rows
    return found


# ---- by hand -------------------------------------------------------------------------------------


def loop(case: Case) -> Steps:
    """One forward a sample and one backward a row."""

    def rows() -> Jacobian:
        found: dict[str, list[list[Tensor]]] = {
            name: [[] for _ in case.labels] for name in case.params
        }
        before, outside = weights_before(case), heads(case)
        total = [torch.zeros_like(p) for p in outside]
        for i in range(len(case.inputs)):
            out = case.model(case.inputs[i : i + 1])
            for t, (task, y) in enumerate(case.labels.items()):
                loss = cross_entropy(out[task], y[i : i + 1])[0]
                wanted = [*case.params.values(), *outside]
                gradients = torch.autograd.grad(
                    loss, wanted, retain_graph=t + 1 < len(case.labels), allow_unused=True
                )
                for name, g in zip(case.params, gradients, strict=False):
                    found[name][t].append(torch.zeros_like(case.params[name]) if g is None else g)
                for sum_, g in zip(total, gradients[len(case.params) :], strict=True):
                    if g is not None:
                        sum_ += before[t, i] * g
        for p, g in zip(outside, total, strict=True):
            p.grad = g
        return {name: [torch.stack(block) for block in blocks] for name, blocks in found.items()}

    return from_rows(case, rows)


PEERS: dict[str, Peer] = {
    "mtu_fast": Peer(ours, "mtu_fast", materialises=False, settles=SETTLED),
    "TorchJD autogram": Peer(torchjd, "torchjd", materialises=False),
    "vmap(grad), J kept": Peer(vmapped),
    "vmap(grad), QR": Peer(vmapped_qr),
    "Opacus": Peer(opacus, "opacus"),
    "BackPACK": Peer(backpack, "backpack-for-pytorch"),
    "loop over samples": Peer(loop),
}

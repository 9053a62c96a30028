"""What a peer is, and the OrthoGrad step from explicit rows that those who materialise the Jacobian share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.models import Case

ALPHA = 0.5
Jacobian = Mapping[str, Sequence[Tensor]]  # {parameter: its rows [N, *shape] of each task}


class Steps(NamedTuple):
    """What is timed: `gram` returns G [R, R], rows task-major; `step` leaves the update in `.grad`, heads included.

    Both begin with the forward. A way that needs no Gram has None for it.
    """

    gram: Callable[[], Tensor] | None
    step: Callable[[], None]


class Peer(NamedTuple):
    """A way to the step: `prepare` may change the case's model, which is nobody else's."""

    prepare: Callable[[Case], Steps]
    package: str = ""  # distribution whose version is recorded; "" for torch
    materialises: bool = True  # whether the rows of all parameters are in memory together
    settles: int = 0  # calls before those that are timed, in which it looks at its own results


def means(forget: Tensor, tasks: int) -> tuple[Tensor, Tensor]:
    """Weights [R] of the mean retain and the mean forget row of each task, summed over tasks; forget [R] bool."""
    f = forget.double()
    return (1 - f) * tasks / (1 - f).sum(), f * tasks / f.sum()


def weights(G: Tensor, forget: Tensor, tasks: int) -> Tensor:
    """w = α r - (1-α)(f - G_rr⁻¹ G_r. f), [R] float64, from G [R, R] and the mask of forget rows [R]."""
    retain = ~forget
    r, f = means(forget, tasks)
    inside = torch.zeros_like(f)
    G = G.double()
    inside[retain] = torch.linalg.solve(G[retain][:, retain], G[retain] @ f)
    return ALPHA * r - (1 - ALPHA) * (f - inside)


def weights_before(case: Case) -> Tensor:
    """α r - (1-α) f as [T, N] in the losses' dtype: what heads outside get."""
    r, f = means(case.forget.repeat(len(case.labels)), len(case.labels))
    dtype = next(iter(case.params.values())).dtype
    return (ALPHA * r - (1 - ALPHA) * f).to(dtype).view(len(case.labels), -1)


def heads(case: Case) -> list[nn.Parameter]:
    """The parameters outside the rows."""
    return [p for name, p in case.model.named_parameters() if name not in case.params]


def backward_of_heads(case: Case, losses: Mapping[str, Tensor]) -> None:
    """`.grad` of the parameters outside the rows; the graph stays."""
    outside = heads(case)
    if outside:
        total = (torch.stack(list(losses.values())) * weights_before(case)).sum()
        for p, g in zip(
            outside, torch.autograd.grad(total, outside, retain_graph=True), strict=True
        ):
            p.grad = g


def shared_module(case: Case) -> nn.Module:
    """The module that holds the row parameters: the whole model, or its backbone."""
    module: nn.Module = case.model.backbone if heads(case) else case.model
    return module


def gram_of(rows: Jacobian) -> Tensor:
    """J Jᵀ [R, R] of the tensors' blocks of rows: products in their precision, float64 sums over the tensors."""
    tasks, first = len(next(iter(rows.values()))), next(iter(rows.values()))[0]
    samples = len(first)
    G = torch.zeros(tasks, samples, tasks, samples, dtype=torch.float64, device=first.device)
    for blocks in rows.values():
        flat = [block.flatten(1) for block in blocks]
        for t in range(tasks):
            for u in range(t, tasks):
                product = flat[t] @ flat[u].T
                G[t, :, u] += product
                if t != u:
                    G[u, :, t] += product.T
    return G.view(tasks * samples, tasks * samples)


def combine(case: Case, rows: Jacobian, w: Tensor) -> None:
    """.grad = Jᵀ w."""
    for name, parameter in case.params.items():
        parts = [
            v @ block.flatten(1)
            for v, block in zip(
                w.to(parameter.dtype).split(len(case.forget)), rows[name], strict=True
            )
        ]
        parameter.grad = (
            torch.stack(parts).sum(0).view_as(parameter)
            if len(parts) > 1
            else parts[0].view_as(parameter)
        )


def from_rows(case: Case, rows: Callable[[], Jacobian]) -> Steps:
    """J kept, then J Jᵀ, the weights and Jᵀ w; `rows` makes J and leaves `.grad` of the heads."""

    def step() -> None:
        case.model.zero_grad()
        J = rows()
        combine(
            case, J, weights(gram_of(J), case.forget.repeat(len(case.labels)), len(case.labels))
        )

    return Steps(lambda: gram_of(rows()), step)

"""What tests of the engine compare: rows against the truth, gradients left in `.grad`, losses of one task set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers.measured import Measured
from tests.helpers.models.base import Forward, MultiTask
from tests.helpers.truth import combine_truth, gram_truth, jacobian, matrix, relative_error
from tests.helpers.zoo import Case

# a parameter whose gradient is smaller than this share of all is compared on this scale
FLOOR = 1e-3


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that require grad, in the engine's order."""
    return [p for p in model.parameters() if p.requires_grad]


def random_weights(count: int, seed: int = 0) -> Tensor:
    """Weights [count], float64, of either sign."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def combine_error(
    found: Mapping[Tensor, Tensor], truth: Mapping[int, Tensor], params: Sequence[Tensor]
) -> float:
    """The largest error of a parameter's d, relative to its norm (or to FLOOR of the norm of all)."""
    total = float(torch.stack([d.norm() for d in truth.values()]).norm())
    worst = 0.0
    for j, p in enumerate(params):
        d = found.get(p, torch.zeros_like(p))
        assert d.shape == p.shape and d.dtype == p.dtype
        scale = max(float(truth[j].norm()), FLOOR * total) or 1.0
        worst = max(worst, float((d.double() - truth[j]).norm()) / scale)
    return Measured(worst)


def assert_rows(
    rows: mtu.Rows,
    J: Mapping[int, Tensor],
    params: Sequence[Tensor],
    tolerance: float,
    seed: int = 0,
) -> None:
    """G and d of random weights are those of J, and so is what the rows feel of that d."""
    G = rows.gram()
    assert G.dtype == torch.float64
    assert relative_error(G, gram_truth(J)) <= tolerance
    w = random_weights(len(rows), seed)
    d = rows.vjp(w)
    assert combine_error(d, combine_truth(J, w), params) <= tolerance
    felt = matrix(J) @ vector([d.get(p) for p in params], params)
    assert relative_error(rows.jvp(d), felt) <= tolerance


def joined(*stacks: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Several J under one another."""
    return {j: torch.cat([J[j] for J in stacks]) for j in stacks[0]}


def truth_of(losses: Mapping[str, Tensor], params: Iterable[Tensor]) -> dict[int, Tensor]:
    """J by one backward per row; the graph is kept."""
    return jacobian(losses, params)


def twin(case: Case, model: MultiTask, tasks: int, n: int, seed: int = 7) -> Forward:
    """Another forward of the same parameters, on other data of another size."""
    other, forward = case.build(tasks, n, seed)
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        for name, parameter in mine.named_parameters(recurse=False):
            setattr(theirs, name, parameter)
        for name, value in mine.named_buffers(recurse=False):
            setattr(theirs, name, value)
    return forward


def grads(params: Iterable[Tensor]) -> list[Tensor | None]:
    """A copy of every `.grad`."""
    return [None if p.grad is None else p.grad.clone() for p in params]


def same_grads(before: Sequence[Tensor | None], params: Iterable[Tensor]) -> bool:
    """Whether every `.grad` is what it was, to the bit."""
    now = [p.grad for p in params]
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
               for a, b in zip(before, now, strict=True))  # fmt: skip


def vector(tensors: Iterable[Tensor | None], params: Iterable[Tensor]) -> Tensor:
    """Gradients end to end in float64, zero where there is none."""
    given = [
        torch.zeros_like(p) if g is None else g.detach()
        for g, p in zip(tensors, params, strict=True)
    ]
    return torch.cat([(g.to_dense() if g.is_sparse else g).double().flatten() for g in given])


def grad_vector(params: Sequence[Tensor]) -> Tensor:
    """All `.grad` end to end."""
    return vector([p.grad for p in params], params)


def clear(params: Iterable[Tensor]) -> None:
    """Forget every `.grad`."""
    for p in params:
        p.grad = None

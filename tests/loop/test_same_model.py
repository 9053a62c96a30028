"""Fast and slow make the same model: 50 steps of the loop against 50 of the reference, in float64 on a smooth net."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast import reference
from tests.helpers.models.base import MultiTask
from tests.loop.scene import data, held_out, loader, losses, net, parameters, sgd, trained

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, LR = 50, 0.02
Losses = dict[str, Tensor]
Step = Callable[[list[Tensor], Losses, dict[str, Tensor], int], None]


def everyone(model: nn.Module, batch: Any) -> Losses:
    """Losses of all samples: the reference knows no missing labels."""
    x, y = batch
    return losses(model, (x, y.clamp(min=0)))[0]


def both(first: Any, second: Any) -> list[Tensor]:
    return [torch.cat(pair) for pair in zip(first, second, strict=True)]


def slow(model: MultiTask, retain: Any, forget: Any, targets: tuple[str, ...], step: Step) -> Tensor:
    """The steps by hand: one forward on both batches, the reference's direction, plain descent."""
    kept, gone, held = list(retain), list(forget), list(model.parameters())
    for i in range(STEPS):
        first, second = kept[i % len(kept)], gone[i % len(gone)]
        last = torch.arange(len(first[0]) + len(second[0])) >= len(first[0])
        found = everyone(model, both(first, second))
        masks = {task: last if task in targets else torch.zeros_like(last) for task in found}
        for p in held:
            p.grad = None
        step(held, found, masks, i)
        with torch.no_grad():
            for p in held:
                p.sub_(p.grad, alpha=LR)
    return parameters(model)


def by_name(name: str, **options: Any) -> Callable[[MultiTask, Any, Any], Step]:
    def make(model: MultiTask, forget: Any, retain: Any) -> Step:
        def step(held: list[Tensor], found: Losses, masks: dict[str, Tensor], i: int) -> None:
            reference.backward(held, found, name, forget=masks, **options)

        return step

    return make


def nabla_tau(model: MultiTask, forget: Any, retain: Any) -> Step:
    """The schedule written out: alpha falls from 5/3 · 6/24 over E = 3 R / F passes, τ is measured every fifth."""
    whole, epochs = both(*held_out()), int(3 * len(list(retain)) / len(list(forget)))
    tau: dict[str, float] = {}

    def step(held: list[Tensor], found: Losses, masks: dict[str, Tensor], i: int) -> None:
        epoch, within = divmod(i, len(list(forget)))
        if within == 0 and epoch % 5 == 0:
            tau.update({task: loss.mean().item() for task, loss in everyone(model, whole).items()})
        J = reference.flatten(reference.jacobian(found, held)).split([len(loss) for loss in found.values()])
        rows = dict(zip(found, J, strict=True))
        d = reference.nabla_tau(
            {task: g[~masks[task]] for task, g in rows.items()}, {task: g[masks[task]] for task, g in rows.items()},
            {task: loss.detach()[masks[task]] for task, loss in found.items()}, tau, 5 / 12 * (1 - epoch / epochs),
        )  # fmt: skip
        for p, g in zip(held, reference.unflatten(d, held), strict=True):
            p.grad = g

    return step


CASES: dict[str, tuple[Callable[[], Any], Callable[[MultiTask, Any, Any], Step]]] = {
    "OrthoGrad": (lambda: mtu.OrthoGrad(0.4), by_name("orthograd", alpha=0.4, tol=1e-7)),
    "GradDiff": (lambda: mtu.GradDiff(0.7), by_name("graddiff", alpha=0.7)),
    "PCGrad": (mtu.PCGrad, by_name("pcgrad")),
    "NablaTau": (mtu.NablaTau, nabla_tau),
}


@pytest.mark.parametrize("targets", [("a", "b"), ("a",)], ids=["full", "partial"])
@pytest.mark.parametrize("name", list(CASES))
def test_fifty_steps(name: str, targets: tuple[str, ...]) -> None:
    method, make = CASES[name]
    whole = data()
    forget, retain = loader(whole, range(6), 3), loader(whole, range(6, 24), 1 if name == "NablaTau" else 4)
    original = trained(net(), steps=30)
    fast, other = copy.deepcopy(original), copy.deepcopy(original)
    history = mtu.unlearn(
        fast, sgd(fast, LR), forget=forget, retain=retain, losses=everyone, method=method(), targets=targets,
        validation=held_out() if name == "NablaTau" else None, max_steps=STEPS, every=25, progress=False,
    )  # fmt: skip
    assert history.step == STEPS
    expected = slow(other, retain, forget, targets, make(other, forget, retain))
    assert (parameters(fast) - expected).abs().max() <= 1e-8
    assert (expected - parameters(original)).norm() > 0.05

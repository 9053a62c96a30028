"""Fast and slow make the same model: 30 steps of the loop against 30 of the reference, in float64 on a smooth net."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import mtu_fast as mtu
from mtu_fast import reference
from tests.helpers.models.base import MultiTask
from tests.unlearning.loop.scene import (
    CLASSES,
    data,
    held_out,
    loader,
    losses,
    net,
    parameters,
    sgd,
    trained,
)

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, LR = 30, 0.02
# of a subspace; of more rows some lie nearly in the span of others, and rounding says which
SIZE, EVERY = 20, 7
Losses = dict[str, Tensor]
Step = Callable[[list[Tensor], Losses, dict[str, Tensor], int], None]
Make = Callable[[MultiTask, Any, Any], Step]  # (model, forget, retain)


def everyone(model: nn.Module, batch: Any) -> Losses:
    """Losses of all samples: the reference knows no missing labels."""
    x, y = batch
    return losses(model, (x, y.clamp(min=0)))[0]


def both(first: Any, second: Any) -> list[Tensor]:
    return [torch.cat(pair) for pair in zip(first, second, strict=True)]


def slow(
    model: MultiTask, retain: Any, forget: Any, targets: tuple[str, ...], step: Step
) -> Tensor:
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


def by_name(name: str, tensorwise: bool = False, **options: Any) -> Make:
    def make(model: MultiTask, forget: Any, retain: Any) -> Step:
        def step(held: list[Tensor], found: Losses, masks: dict[str, Tensor], i: int) -> None:
            blocks = [[j] for j in range(len(held))] if tensorwise else None
            reference.backward(held, found, name, forget=masks, blocks=blocks, **options)

        return step

    return make


def in_span(**options: Any) -> Make:
    """Explicit rows of the target tasks, kept by the rule of `Subspace`: batch by batch until SIZE, one in EVERY after.

    A batch is let go as soon as SIZE rows are held without it. What a basis spans is what its rows
    span.
    """

    def make(model: MultiTask, forget: Any, retain: Any) -> Step:
        batches: list[Tensor] = []
        last = 0  # the step that was last kept

        def step(held: list[Tensor], found: Losses, masks: dict[str, Tensor], i: int) -> None:
            nonlocal last
            full = sum(map(len, batches)) >= SIZE
            kept = torch.cat(batches) if full else None
            if not full or i - last == EVERY:
                J = reference.flatten(reference.jacobian(found, held)).split([
                    len(loss) for loss in found.values()
                ])
                batches.append(
                    torch.cat([g for g, mask in zip(J, masks.values(), strict=True) if mask.any()])
                )
                last = i
                while sum(map(len, batches[1:])) >= SIZE:
                    batches.pop(0)
            reference.backward(
                held, found, "interference_aware", forget=masks, subspace=kept, tol=1e-7, **options
            )

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
        J = reference.flatten(reference.jacobian(found, held)).split([
            len(loss) for loss in found.values()
        ])
        rows = dict(zip(found, J, strict=True))
        d = reference.nabla_tau(
            {task: g[~masks[task]] for task, g in rows.items()}, {task: g[masks[task]] for task, g in rows.items()},
            {task: loss.detach()[masks[task]] for task, loss in found.items()}, tau, 5 / 12 * (1 - epoch / epochs),
        )  # fmt: skip
        for p, g in zip(held, reference.unflatten(d, held), strict=True):
            p.grad = g

    return step


CASES: dict[str, tuple[Callable[[], Any], Make]] = {
    "OrthoGrad": (lambda: mtu.OrthoGrad(0.4), by_name("orthograd", alpha=0.4, tol=1e-7)),
    "GradDiff": (lambda: mtu.GradDiff(0.7), by_name("graddiff", alpha=0.7)),
    "RandomLabels": (lambda: mtu.RandomLabels(0.7), by_name("random_labels", alpha=0.7)),
    "PCGrad": (mtu.PCGrad, by_name("pcgrad")),
    "NablaTau": (mtu.NablaTau, nabla_tau),
    "GDRGMA": (lambda: mtu.GDRGMA(slope=3.0, threshold=0.5), by_name("gdrgma", True, slope=3.0, threshold=0.5)),
    "MUNBa": (mtu.MUNBa, by_name("munba")),
    "UPGrad": (mtu.UPGrad, by_name("upgrad")),
    "InterferenceAware, rows": (lambda: mtu.InterferenceAware(0.4), in_span(alpha=0.4)),
    "InterferenceAware, basis": (lambda: mtu.InterferenceAware(0.4), in_span(alpha=0.4)),
    "InterferenceAware, project first": (
        lambda: mtu.InterferenceAware(0.4, order="project-first"), in_span(alpha=0.4, order="project-first")
    ),
}  # fmt: skip


@pytest.mark.parametrize("targets", [("a", "b"), ("a",)], ids=["full", "partial"])
@pytest.mark.parametrize("name", list(CASES))
def test_thirty_steps(name: str, targets: tuple[str, ...]) -> None:
    method, make = CASES[name]
    whole = data()
    forget, retain = (
        loader(whole, range(6), 3),
        loader(whole, range(6, 24), 1 if name == "NablaTau" else 4),
    )
    if name == "RandomLabels":
        x, y = whole.tensors
        forget = loader(TensorDataset(x, (y + 1) % CLASSES), range(6), 3)
    subspace = (
        mtu.Subspace(SIZE, every=EVERY, basis="basis" in name)
        if name.startswith("Interference")
        else None
    )
    original = trained(net(), steps=30)
    fast, other = copy.deepcopy(original), copy.deepcopy(original)
    history = mtu.unlearn(
        fast, sgd(fast, LR), forget=forget, retain=retain, losses=everyone, method=method(), targets=targets,
        validation=held_out() if name == "NablaTau" else None, subspace=subspace, max_steps=STEPS, every=15,
        progress=False,
    )  # fmt: skip
    assert history.step == STEPS
    expected = slow(other, retain, forget, targets, make(other, forget, retain))
    assert (parameters(fast) - expected).abs().max() <= 1e-8
    assert (expected - parameters(original)).norm() > 0.05

"""Data that move rows from step to step: routing, shuffles, masks, labels, units that come alive."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtu_fast as mtu
from tests.graph.steps import N, S, discoveries, double, steps
from tests.helpers.checks import assert_rows, trained, truth_of
from tests.helpers.zoo import by_name


class Routed(nn.Module):
    """Tokens sorted by a choice that is data: every shape stays, the map from rows to positions moves."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.experts = how, nn.ModuleList(nn.Linear(4, 4) for _ in range(2)).double()

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        order = choice.flatten().argsort(stable=True)  # half of the tokens to either expert
        back = order.argsort()
        if self.how == "index":
            h = tokens[order]
        elif self.how == "index_select":
            h = tokens.index_select(0, order)
        elif self.how == "gather":
            h = tokens.gather(0, order[:, None].expand(-1, 4))
        elif self.how == "embedding":
            h = F.embedding(order, tokens)
        elif self.how == "product":
            h = F.one_hot(order, len(order)).double() @ tokens
        else:
            h = torch.zeros_like(tokens).scatter(0, back[:, None].expand(-1, 4), tokens)
        h = torch.cat([
            torch.tanh(e(part)) for e, part in zip(self.experts, h.chunk(2), strict=True)
        ])
        return h[back].view_as(x)


@pytest.mark.parametrize(
    "how", ["index", "index_select", "gather", "embedding", "product", "scatter"]
)
def test_routing_that_moves_between_steps(how: str) -> None:
    torch.manual_seed(1)
    net, before = Routed(how), nn.Linear(4, 4).double()
    model = nn.ModuleList([net, before])

    def losses() -> Iterator[Tensor]:
        for step in range(5):
            choice = (
                (torch.randperm(N * S) < N * S // 2).view(N, S)
                if step
                else torch.arange(N * S).view(N, S) % 2
            )
            yield net(before(double(N, S, 4)), choice.long()).square().mean((1, 2))

    steps(model, losses())


def test_mixture_of_experts_over_steps() -> None:
    """Top-1 routing where every expert sees as many tokens at every step, but other ones."""
    model, forward = by_name("routed_by_scatter").build(1, N)
    engine, params = mtu.Engine(model), trained(model)
    for step in range(4):
        forward.inputs = (double(N, 5, 4),)
        losses = forward()
        J = truth_of(losses, params)
        assert_rows(engine.rows(losses), J, params, 1e-10, seed=step)


def test_a_shuffle_that_changes_every_step() -> None:
    inner, after = nn.Linear(3, 6).double(), nn.Linear(6, 4).double()

    def losses() -> Iterator[Tensor]:
        for step in range(6):
            order = torch.randperm(N) if step else torch.arange(N)
            yield (
                after(torch.tanh(inner(double(N, S, 3)[order]))[order.argsort()])
                .square()
                .mean((1, 2))
            )

    steps(nn.ModuleList([inner, after]), losses())


def masked(net: nn.Module, keep: Tensor, how: str) -> Tensor:
    per_token = net(double(*keep.shape, 3)).square().mean(-1)
    if how == "product":
        return (per_token * keep).sum(1) / keep.sum(1).clamp(min=1)
    if how == "where":
        return torch.where(keep, per_token, 0.0).sum(1)
    return per_token.masked_fill(~keep, 0.0).sum(1)


@pytest.mark.parametrize("how", ["product", "where", "masked_fill"])
def test_a_mask_that_changes_every_step(how: str) -> None:
    """Positions without gradient when the plan was made have one later, in any order."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()

    def losses() -> Iterator[Tensor]:
        first = torch.zeros(N, S, dtype=torch.bool)
        first[:, 0] = True
        for keep in (
            first,
            ~first,
            first,
            first.flip(1),
            torch.ones_like(first),
            torch.eye(N, S).bool(),
            first,
        ):
            yield masked(net, keep, how)

    steps(net, losses())


def test_a_sample_without_gradient_at_first() -> None:
    """No element told which row that sample is; the next step does."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    silent = (
        torch.tensor([0.0, 1, 1, 1]),
        torch.tensor([1.0, 1, 1, 0]),
        torch.zeros(4),
        torch.ones(4),
    )
    steps(net, (net(double(N, S, 3)).square().mean((1, 2)) * on for on in silent))


@pytest.mark.parametrize("layout", ["samples first", "sequence first"])
def test_ignored_labels_that_change_every_step(layout: str) -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()

    def losses() -> Iterator[Tensor]:
        for _step in range(6):
            labels = torch.randint(-1, 4, (N, S))
            x = double(N, S, 3)
            y = net(x) if layout == "samples first" else net(x.transpose(0, 1)).transpose(0, 1)
            yield F.cross_entropy(y.transpose(1, 2), labels, ignore_index=-1, reduction="none").sum(
                1
            )

    steps(net, losses())


@pytest.mark.parametrize("dim", [1, 2])
def test_labels_that_all_differ_keep_the_plan(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a picked class is one number per sample: of 100 classes, no two samples have the same."""
    net, found = (
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 100)).double(),
        discoveries(monkeypatch),
    )
    shape = (N,) if dim == 1 else (N, S)

    def losses() -> Iterator[Tensor]:
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            labels = torch.randperm(100, generator=generator)[: math.prod(shape)].view(shape)
            logits = net(double(*shape, 3))
            loss = F.cross_entropy(logits if dim == 1 else logits.mT, labels, reduction="none")
            yield loss if dim == 1 else loss.sum(1)

    steps(net, losses())
    assert len(found) == 1


@pytest.mark.parametrize("C", [2, 4])
def test_picked_classes_in_the_samples_own_order(C: int) -> None:
    """Class i of sample i, with the samples first or last, and a softmax or none; later batches tell."""
    for samples_last in (False, True):
        for softmax in (False, True):
            net = nn.Linear(3, C).double()

            def losses(
                net: nn.Module = net, last: bool = samples_last, softmax: bool = softmax
            ) -> Iterator[Tensor]:
                for labels in (
                    torch.arange(C),
                    torch.arange(C).flip(0),
                    torch.zeros(C).long(),
                    torch.arange(C),
                ):
                    logits = net(double(C, 3)).T if last else net(double(C, 3))
                    scores = logits.log_softmax(0 if last else 1) if softmax else logits
                    yield -(scores.T if last else scores).gather(1, labels[:, None])[:, 0]

            steps(net, losses())


def test_dead_units_come_alive() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    steps(
        net,
        (
            net(scale * double(N, S, 3)).square().mean((1, 2))
            for scale in (0.0, 1.0, -1.0, 0.0, 5.0)
        ),
    )

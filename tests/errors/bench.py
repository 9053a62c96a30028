"""A model with gradients in place, and the assertion that a refused call leaves no trace."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers.checks import assert_rows, grads, same_grads, trained, truth_of

N = 4


MASK = torch.tensor([True, False, False, True])


Losses = dict[str, Tensor]


class Probe(nn.Module):
    """Backbone and head; every activation of a forward is remembered weakly."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid())
        self.heads = nn.ModuleDict({task: nn.Linear(5, 2) for task in ("a", "b")})
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Losses:
        self.seen = []
        for layer in self.backbone:
            x = layer(x)
            self.seen.append(weakref.ref(x))
        return {task: head(x).square().mean(1) for task, head in self.heads.items()}


class Bench:
    """A model with gradients in place, its engine, and a forward."""

    def __init__(self, n: int = N) -> None:
        self.model = Probe().double()
        self.engine = mtu.Engine(self.model, params=self.model.backbone.parameters())
        self.x = torch.randn(n, 3, dtype=torch.float64)
        for p in self.model.parameters():
            p.grad = torch.randn_like(p)

    def losses(self) -> Losses:
        return self.model(self.x)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """`.grad` is the same object with the same bits, and the activations of the last forward are freed."""
        params = list(self.model.parameters())
        before, objects = grads(params), [p.grad for p in params]
        yield
        assert same_grads(before, params)
        assert all(p.grad is g for p, g in zip(params, objects, strict=True))
        gc.collect()
        assert [ref() for ref in self.model.seen if ref() is not None] == []


def refused(
    bench: Bench, error: type[Exception], match: str, call: Callable[[Losses], Any]
) -> None:
    """`call` on fresh losses raises, leaves `.grad`, frees the graph, and the engine works on."""
    with bench.untouched():
        with pytest.raises(error, match=match) as caught:
            call(bench.losses())
        caught.value.__traceback__ = None
        del caught
    losses, params = bench.losses(), trained(bench.model.backbone)
    J = truth_of(losses, params)
    assert_rows(bench.engine.rows(losses), J, params, 1e-12)

"""Steps of one engine over batches of the same shapes, each compared with autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._graph import plans as plans_module
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.plan import Plan
from tests.helpers.checks import assert_rows, trained, truth_of

N, S = 4, 5


def steps(model: nn.Module, losses: Iterator[Tensor], *, by_rule: bool = True) -> mtu.Engine:
    """One engine over many steps; every step is compared with autograd."""
    engine, params = mtu.Engine(model), trained(model)
    for step, loss in enumerate(losses):
        J = truth_of({"loss": loss}, params)
        assert_rows(engine.rows(loss), J, params, 1e-10, seed=step)
        if by_rule:
            assert not any(line.slow for line in engine.explain().lines)
    return engine


def discoveries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the plans that are made from here on."""
    found: list[int] = []
    plain = plans_module.discover

    def counted(graph: Graph, *args: Any) -> Plan:
        found.append(len(graph.nodes))
        return plain(graph, *args)

    monkeypatch.setattr(plans_module, "discover", counted)
    return found


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)

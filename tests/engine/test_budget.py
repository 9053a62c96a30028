"""A memory budget for rows: what is kept changes, and no result does."""

from __future__ import annotations

import torch
from torch import nn

import mtu_fast as mtu
from tests.engine.small import build
from tests.helpers.checks import (
    random_weights,
)
from tests.helpers.truth import relative_error


def test_a_budget_changes_only_what_is_kept() -> None:
    model, forward, params, _ = build("mlp_3d_no_bias", tasks=1, n=4)
    wide = nn.Linear(200, 240, bias=False).double()
    x = torch.randn(4, 60, 200, dtype=torch.float64)
    found = {}
    for budget in (0, 4 * 200 * 240 * 8):
        engine = mtu.Engine(wide, memory_budget=budget)
        rows = engine.rows(wide(x).square().sum((1, 2)))
        (line,) = engine.explain().lines
        found[line.kept] = (rows.gram(), rows.vjp(random_weights(4))[wide.weight], line.bytes)
    assert found.keys() == {"rows", "factors"}
    assert relative_error(found["rows"][0], found["factors"][0]) <= 1e-13
    assert relative_error(found["rows"][1], found["factors"][1]) <= 1e-13
    assert found["rows"][2] == 4 * 200 * 240 * 8
    assert found["factors"][2] == 4 * 60 * (200 + 240) * 8


def test_a_budget_is_not_overdrawn() -> None:
    layers = nn.Sequential(
        nn.Linear(200, 200, bias=False), nn.Tanh(), nn.Linear(200, 200, bias=False)
    ).double()
    x = torch.randn(4, 60, 200, dtype=torch.float64)
    # by how much the rows of one layer are more than its factors
    one = 4 * (200 * 200 - 60 * (200 + 200)) * 8
    kept = []
    for budget in (0, one, 2 * one):
        engine = mtu.Engine(layers, memory_budget=budget)
        engine.rows(layers(x).square().sum((1, 2)))
        kept.append(sorted(line.kept for line in engine.explain().lines))
    assert kept == [["factors", "factors"], ["factors", "rows"], ["rows", "rows"]]


def test_a_budget_is_one_for_all_tasks() -> None:
    layer = nn.Linear(200, 200, bias=False).double()
    x = torch.randn(4, 60, 200, dtype=torch.float64)
    # the rows of one task beyond its factors
    one = 4 * 200 * 200 * 8 - (factors := 4 * 60 * (200 + 200) * 8)
    held = []
    for budget in (0, one, 3 * one):
        engine = mtu.Engine(layer, memory_budget=budget)
        h = layer(x)
        engine.rows({task: h.pow(k).sum((1, 2)) for k, task in enumerate("abc", start=2)})
        (line,) = engine.explain().lines
        held.append(line.bytes)
    assert held == [3 * factors, 3 * factors + one, 3 * (factors + one)]


def test_a_budget_is_not_for_rows_that_cost_more_than_they_save() -> None:
    """Few positions: a pass over rows takes longer than a weight gradient."""
    layer = nn.Linear(100, 100, bias=False).double()
    engine = mtu.Engine(layer, memory_budget=1 << 30)
    engine.rows(layer(torch.randn(4, 8, 100, dtype=torch.float64)).square().sum((1, 2)))
    assert [line.kept for line in engine.explain().lines] == ["factors"]


def test_a_budget_is_not_for_rows_that_a_gram_would_not_form() -> None:
    """One position: the products of factors are all there is to do."""
    layer = nn.Linear(30, 30, bias=False).double()
    engine = mtu.Engine(layer, memory_budget=1 << 30)
    engine.rows(layer(torch.randn(4, 30, dtype=torch.float64)).square().sum(1))
    assert [line.kept for line in engine.explain().lines] == ["factors"]


def test_the_smaller_is_kept() -> None:
    """Positions × (in + out) against in × out: rows where there are many positions, factors where there are few."""
    layer = nn.Linear(6, 8).double()
    for positions, expected in ((3, "factors"), (4, "rows")):
        engine = mtu.Engine(layer)
        engine.rows(layer(torch.randn(5, positions, 6, dtype=torch.float64)).sum((1, 2)))
        line = {line.name: line for line in engine.explain().lines}["weight"]
        assert line.kept == expected

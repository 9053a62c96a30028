"""Plans are kept, checked against an ordinary backward after 1, 2, 4, ... steps, and replaced where they fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._graph import plans
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.plan import Plan, Site
from tests.helpers.checks import assert_rows, combine_error, random_weights, trained, truth_of
from tests.helpers.truth import combine_truth

N = 5


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers = [nn.Embedding(7, 6), nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def loss_of(model: nn.Module, index: Tensor | None = None) -> Tensor:
    index = torch.randint(7, (N, 4)) if index is None else index
    out: Tensor = model(index)
    return (
        out.float().square().mean((1, 2)) if out.dtype.itemsize < 4 else out.square().mean((1, 2))
    )


def test_a_plan_is_checked_after_1_2_4_8_steps(checks: list[int]) -> None:
    model = net()
    engine = mtu.Engine(model)
    checked = []
    for _step in range(18):
        before = len(checks)
        engine.rows(loss_of(model))
        checked.append(len(checks) - before)
    assert [step for step, n in enumerate(checked) if n] == [0, 1, 2, 4, 8, 16]


def serves(site: Site, parameter: int) -> bool:
    """Whether the site is of this parameter."""
    return site.way is not None and site.way.parameter == parameter


def dropped(plan: Plan) -> Plan:
    """A use is missing."""
    node = next(i for i, of in plan.sites.items() if any(serves(site, 1) for site in of))
    left = [site for site in plan.sites[node] if not serves(site, 1)]
    return replace(plan, sites=plan.sites | {node: left})


def doubled(plan: Plan) -> Plan:
    """A use counts twice."""
    sites = {i: [*of, *(site for site in of if serves(site, 3))] for i, of in plan.sites.items()}
    return replace(plan, sites=sites)


def swapped(plan: Plan) -> Plan:
    """Two rows are taken for each other, at one node."""
    node = next(i for i, sites in plan.sites.items() if any(serves(site, 0) for site in sites))
    row_map = plan.maps[0][node][0]
    assert row_map is not None
    ids = np.array([1, 0, 2, 3, 4])[row_map.ids]
    return replace(plan, maps=[{**plan.maps[0], node: (replace(row_map, ids=ids),)}])


FAULTS = {fault.__name__: fault for fault in (dropped, doubled, swapped)}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_plan_does_not_pass(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A discovery with a fault in it: the rows are right all the same, one backward each, and it is said."""
    plain = plans.discover
    monkeypatch.setattr(plans, "discover", lambda graph: FAULTS[name](plain(graph)))
    model = net(dtype)
    engine, params = mtu.Engine(model), trained(model)
    loss = loss_of(model)
    J = truth_of({"a": loss}, params)
    with pytest.warns(
        RuntimeWarning, match=r"do not add up to what autograd gives .*one backward each"
    ):
        rows = engine.rows(loss)
    w = random_weights(N)
    assert combine_error(rows.vjp(w), combine_truth(J, w), params) <= 4 * torch.finfo(dtype).eps
    assert all(
        line.slow and line.sites == ("one backward per row",) for line in engine.explain().lines
    )


@pytest.mark.parametrize("name", FAULTS)
def test_a_kept_plan_that_went_wrong_is_made_anew(name: str) -> None:
    """Whatever spoiled it: the check finds it, and its step is right already."""
    model = net()
    engine, params = mtu.Engine(model), trained(model)
    for _step in range(2):
        engine.rows(loss_of(model))
    (known,) = engine._own.plans._known.values()
    known.plan = FAULTS[name](known.plan)
    for _step in range(2):
        loss = loss_of(model)
        J = truth_of({"a": loss}, params)
        assert_rows(engine.rows(loss), J, params, 1e-10)
        assert "did not add up" in engine.explain().anew


def test_small_rows_are_checked_as_large_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row a millionth as long as the others, taken for another one."""
    plain = plans.discover
    monkeypatch.setattr(plans, "discover", lambda graph: swapped(plain(graph)))
    model = net()
    scale = torch.tensor([1e-6, 1, 1, 1, 1], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="one backward each"):
        mtu.Engine(model).rows(loss_of(model) * scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_no_fault(dtype: torch.dtype) -> None:
    """Nothing is warned of, and nothing refused, where a gradient is a difference of far larger ones."""
    half = dtype == torch.bfloat16
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]).to(
            torch.float32 if half else dtype
        )
        engine = mtu.Engine(model)
        for k in range(4):
            x = torch.randn(N, 6, 8, dtype=model[0].weight.dtype)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                # the second bias changes nothing in it
                attention = torch.softmax(model[0](x) @ model[1](x).mT, -1)
            engine.rows((attention - 1 / 6).square().mean((1, 2)) * 100.0**-k)
        assert not any(line.sites == ("one backward per row",) for line in engine.explain().lines)


def indexed(model: nn.Module, order: Tensor) -> Tensor:
    return loss_of(model, torch.randint(7, (N, 4))) + F.embedding(
        order, model[4](double(N, 8))
    ).square().sum(1)


def orders() -> Iterator[Tensor]:
    yield from (torch.arange(N), torch.arange(N), torch.arange(N).flip(0))


def test_what_is_looked_at_in_every_step_is_said() -> None:
    model = net()
    engine, params = mtu.Engine(model), trained(model)
    said = []
    for order in orders():
        loss = indexed(model, order)
        J = truth_of({"a": loss}, params)
        assert_rows(engine.rows(loss), J, params, 1e-10)
        said.append(engine.explain())
    assert [e.trials for e in said] == [("EmbeddingBackward0",)] * 3
    assert [e.anew for e in said] == [
        "",
        "",
        "EmbeddingBackward0 moved rows in another way than before",
    ]
    assert "looked at in every step" in str(said[0]) and "made anew for this step" in str(said[2])


def test_plans_that_only_shapes_decide_have_no_trials() -> None:
    model = net()
    loss = loss_of(model)
    assert not plans.discover(Graph([loss], list(model.parameters()))).trials


def test_what_is_looked_up_below_a_pass_is_taken_of_a_graph_that_the_pass_frees() -> None:
    """Positions are alike for all rows: theirs are added up in a mixed part, where no node has to run."""
    positions, layer = nn.Embedding(5, 3).double(), nn.Linear(3, 2).double()
    model = nn.ModuleList([positions, layer])
    engine = mtu.Engine(model)
    at, x = torch.arange(5), torch.randn(4, 5, 3).double()

    def losses() -> Tensor:
        found: Tensor = layer((x + positions(at)).tanh()).square().sum((1, 2))
        return found

    for _ in range(5):
        rows = engine.rows(used := losses())
        w = random_weights(4)
        truth = torch.autograd.grad(losses(), list(model.parameters()), w)
        for g, p in zip(truth, model.parameters(), strict=True):
            torch.testing.assert_close(rows.vjp(w)[p], g, rtol=1e-10, atol=1e-12)
        with pytest.raises(RuntimeError, match="second time"):
            used.sum().backward()
    (known,) = engine._own.plans._known.values()
    assert not known.plan.late

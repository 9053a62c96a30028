"""Rows through parts of a graph that depend on parameters alone: in common, by look-up, all together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import mtu_fast as mtu
from mtu_fast._graph import pull
from tests.helpers.checks import assert_rows, joined, trained, truth_of

N, S, D = 6, 5, 4

pytestmark = pytest.mark.usefixtures("one_thread")


def checked(
    model: nn.Module, losses: Callable[[], Tensor], tolerance: float = 1e-12
) -> dict[str, str]:
    """Three batches by one engine; how each parameter's rows are kept."""
    params, engine = trained(model), mtu.Engine(model)
    for _ in range(3):
        loss = losses()
        J = truth_of({"a": loss}, params)
        assert_rows(engine.rows(loss), J, params, tolerance)
    assert not any(
        "vjp" in site or "backward per row" in site
        for line in engine.explain().lines
        for site in line.sites
    )
    return {line.name: line.kept + ", " + line.route for line in engine.explain().lines}


def net(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, width), nn.Tanh(), nn.Linear(width, D)).double()


def inputs() -> Tensor:
    return torch.randn(N, D, dtype=torch.float64)


PENALTIES: dict[str, Callable[[nn.Module], Tensor]] = {
    "squares": lambda model: torch.stack([p.square().sum() for p in model.parameters()]).sum(),
    "absolutes, one by one": lambda model: sum(
        (p.abs().sum() for p in model.parameters()), torch.zeros(())
    ),
    "norms": lambda model: torch.stack([p.norm() for p in model.parameters()]).mean(),
    "a product of layers": lambda model: (
        torch.mm(*(p for p in model.parameters() if p.dim() == 2)).square().sum()
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("way", ["added", "to each its share", "multiplied"])
def test_a_penalty_in_every_loss(name: str, way: str) -> None:
    model = net(D if name == "a product of layers" else 8)
    share = torch.rand(N, dtype=torch.float64)

    def losses() -> Tensor:
        own, penalty = model(inputs()).pow(3).sum(1), PENALTIES[name](model)
        if way == "multiplied":
            return own * penalty
        return own + (0.1 if way == "added" else share) * penalty

    kept = checked(model, losses)
    assert "directions in common" in kept["0.weight"] and kept["0.weight"].startswith("factors")


def test_a_penalty_takes_no_row_a_parameter() -> None:
    """Factors of the layer and one direction, where rows would be N of its size."""
    model = nn.Linear(300, 200, bias=False)
    engine, n = mtu.Engine(model), 32
    loss = model(torch.randn(n, 300)).square().sum(1) + 0.1 * model.weight.square().sum()
    rows = engine.rows(loss)
    (line,) = engine.explain().lines
    assert line.kept == "factors" and line.bytes < 1.5 * 4 * (300 * 200 + n * 500)
    J = truth_of(
        {"a": model(torch.randn(n, 300)).square().sum(1) + 0.1 * model.weight.square().sum()},
        [model.weight],
    )
    assert len(rows) == len(J[0])


def test_one_pass_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    through = pull._all_through

    def counted(graph: pull.Graph, seeds: pull.Seeds, together: pull.Together) -> object:
        seen.extend(len(rows) for rows in seeds.values())
        return through(graph, seeds, together)

    monkeypatch.setattr(pull, "_all_through", counted)
    model = net()
    checked(model, lambda: model(inputs()).sum(1) + PENALTIES["squares"](model))
    assert set(seen) == {1}


def test_two_tasks_with_penalties_of_their_own_and_labels_that_lack() -> None:
    model = net()
    params, engine = trained(model), mtu.Engine(model)
    out, one, two = model(inputs()), PENALTIES["squares"](model), PENALTIES["norms"](model)
    losses = {"one": out.square().sum(1) + one, "two": out.pow(3).sum(1) + two}
    there = torch.arange(N) % 2 == 0
    J = joined(
        truth_of({"a": losses["one"]}, params), truth_of({"a": losses["two"][there]}, params)
    )
    rows = engine.rows(losses, present={"one": torch.ones_like(there), "two": there})
    assert_rows(rows, J, params, 1e-12)


def test_a_scale_of_logits() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale, self.few = (
                net(),
                nn.Parameter(torch.tensor(0.3)),
                nn.Parameter(torch.randn(2)),
            )
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = (
                self.net(x) * self.scale.exp()
                + (self.few.softmax(0) * torch.tensor([1.0, 2.0])).sum()
            )
            return found

    model = Scaled()
    checked(model, lambda: model(inputs()).pow(3).sum(1))


# ---- tables that all samples look up alike -------------------------------------------------------


class Positions(nn.Module):
    """Tokens and a table of positions, `[V, D]`, read in one of several ways."""

    def __init__(self, read: Callable[[Tensor], Tensor], entries: int, width: int = D) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(entries, width, dtype=torch.float64))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return x + self.read(self.table)


ORDER = torch.randint(0, 6, (S, S))
TABLES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "positions": (lambda table: F.embedding(torch.arange(S), table), (N, S, D)),
    "positions of one sample": (lambda table: F.embedding(torch.arange(S)[None], table), (N, S, D)),
    "positions, padded": (lambda table: F.embedding(torch.arange(S)[None], table, padding_idx=2), (N, S, D)),
    "by index": (lambda table: table[torch.arange(S) + 1], (N, S, D)),
    "relative": (lambda table: F.embedding(ORDER, table).permute(2, 0, 1)[None], (N, D, S, S)),
    "relative by index": (
        lambda table: table[ORDER.view(-1)].view(S, S, -1).permute(2, 0, 1).contiguous()[None], (N, D, S, S),
    ),
    "scaled": (lambda table: F.embedding(torch.arange(S), table) * 2.5, (N, S, D)),
    "added twice": (lambda table: F.embedding(torch.arange(S), table) + table[torch.arange(S)], (N, S, D)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("entries", [6, 900])
def test_tables_that_are_read_alike(name: str, entries: int) -> None:
    """Rows of a table of few entries, places of one of many."""
    read, shape = TABLES[name]
    model = Positions(read, entries)
    kept = checked(
        model, lambda: model(torch.randn(shape, dtype=torch.float64)).pow(3).flatten(1).sum(1)
    )
    assert name in {"scaled", "added twice"} or kept["table"].startswith("factors") == (
        entries == 900
    )


def test_a_table_read_alike_and_by_sample() -> None:
    table = nn.Embedding(50, D).double()
    token = torch.randint(0, 50, (N, S))
    checked(table, lambda: (table(token) + table(torch.arange(S))).pow(3).flatten(1).sum(1))


# ---- maps of parameters --------------------------------------------------------------------------

MAPS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: weight_norm(nn.Linear(D, 3)),
    "spectral norm": lambda: spectral_norm(nn.Linear(D, 3)).eval(),
    "weight norm of a kernel": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), weight_norm(nn.Conv1d(2, 3, 2))
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_parameters(name: str) -> None:
    model = MAPS[name]().double()
    checked(model, lambda: model(inputs()).pow(3).flatten(1).sum(1))

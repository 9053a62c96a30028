"""Table look-ups by rule, however they are made, and the tables that a batch looks up alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._graph.rules import RULES
from tests.helpers.checks import assert_rows, trained, truth_of

N, S, V, D = 4, 5, 7, 3

pytestmark = pytest.mark.usefixtures("one_thread")


class Table(nn.Module):
    """A table, `[V, D]` or of larger entries, and a function of it."""

    def __init__(self, run: Callable[[Tensor], Tensor], *entry: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, *(entry or (D,)), dtype=torch.float64))
        self.run = run

    def forward(self) -> Tensor:
        return self.run(self.table)


def drawn(*shape: int) -> Tensor:
    return torch.randint(0, V, shape)


def checked(model: nn.Module, way: str, calls: int = 3, kept: str | None = None) -> None:
    """Three batches by one engine; the table is served in that way."""
    params, engine = trained(model), mtu.Engine(model)
    for _ in range(calls):
        out = model()
        weight = torch.randn(N, *out.shape[1:], dtype=out.dtype)
        loss = (out.pow(3) * weight).flatten(1).sum(1)
        J = truth_of({"a": loss}, params)
        assert_rows(engine.rows(loss), J, params, 1e-12)
    (line,) = engine.explain().lines
    assert line.sites == (way,) and (kept is None or line.kept == kept)


def bag(mode: str, **options: Any) -> Callable[[Tensor], Tensor]:
    """Bags of a fixed number of places."""
    return lambda table: F.embedding_bag(drawn(N, S), table, mode=mode, **options)


def ragged(mode: str, padding: int | None = None, last: bool = False) -> Callable[[Tensor], Tensor]:
    """Bags of any number of places, the second one empty."""

    def run(table: Tensor) -> Tensor:
        ends = torch.cat([torch.tensor([0, 2, 2]), torch.randint(2, 9, (1,)), torch.tensor([9])])
        offsets = ends if last else ends[:-1]
        return F.embedding_bag(
            drawn(9), table, offsets, mode=mode, padding_idx=padding, include_last_offset=last
        )

    return run


BAGS = {
    "sum": bag("sum"),
    "mean": bag("mean"),
    "mean, padded": bag("mean", padding_idx=2),
    "sum, padded": bag("sum", padding_idx=-1),
    "ragged sum": ragged("sum"),
    "ragged mean, padded": ragged("mean", 3),
    "ragged mean, last offset": ragged("mean", last=True),
    "several a sample": lambda table: F.embedding_bag(drawn(2 * N, S), table).view(N, -1),
    "several a sample, in turn": lambda table: (
        F.embedding_bag(drawn(2 * N, S), table).view(2, N, -1).transpose(0, 1)
    ),
    "weighted": lambda table: F.embedding_bag(
        drawn(N, S), table, mode="sum", per_sample_weights=torch.randn(N, S, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("name", BAGS)
def test_bags(name: str) -> None:
    checked(Table(BAGS[name]), "EmbeddingBagBackward0: rule")


def test_the_largest_of_a_bag_has_no_rule() -> None:
    checked(Table(bag("max")), "EmbeddingBagBackward0: one local vjp per row")


def test_bags_of_a_large_table_stay_factors() -> None:
    """N × the table's memory otherwise."""
    model = nn.EmbeddingBag(5000, D, mode="sum").double()
    params, engine = trained(model), mtu.Engine(model)
    loss = model(torch.randint(0, 5000, (N, S))).pow(3).sum(1)
    J = truth_of({"a": loss}, params)
    assert_rows(engine.rows(loss), J, params, 1e-12)
    (line,) = engine.explain().lines
    assert line.kept == "factors" and line.bytes < 5000 * D


def test_learned_weights_of_places() -> None:
    """They are a map of another parameter, and mixed in the same bags."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.gate = nn.Parameter(torch.randn(V, D)), nn.Parameter(torch.randn(V))
            self.double()

        def forward(self) -> Tensor:
            where = drawn(N, S)
            found: Tensor = F.embedding_bag(
                where, self.table, mode="sum", per_sample_weights=self.gate[where]
            )
            return found

    model = Net()
    params, engine = trained(model), mtu.Engine(model)
    for _ in range(3):
        loss = model().pow(3).sum(1)
        J = truth_of({"a": loss}, params)
        assert_rows(engine.rows(loss), J, params, 1e-12)
    assert not any(line.slow for line in engine.explain().lines)


BY_INDEX: dict[str, tuple[str, Table]] = {
    "index": ("Index", Table(lambda table: table[drawn(N, S)])),
    "from the end": ("Index", Table(lambda table: table[drawn(N, S) - V])),
    "an entry a sample": ("Index", Table(lambda table: table[drawn(N)])),
    "matrices": ("Index", Table(lambda table: table[drawn(N, S)], 2, 3)),
    "numbers": ("Index", Table(lambda table: table[drawn(N, S)][..., 0], 1)),
    "samples last": ("Index", Table(lambda table: table[drawn(S, N)].transpose(0, 1))),
    "index_select": (
        "IndexSelect",
        Table(lambda table: table.index_select(0, drawn(N * S)).view(N, S, -1)),
    ),
    "embedding": ("Embedding", Table(lambda table: F.embedding(drawn(N, S), table, padding_idx=2))),
}


@pytest.mark.parametrize("name", BY_INDEX)
@pytest.mark.parametrize("rules", [True, False])
def test_by_index(name: str, rules: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    op, model = BY_INDEX[name]
    if not rules:
        monkeypatch.delitem(RULES, f"{op}Backward0")
    checked(model, f"{op}Backward0: " + ("rule" if rules else "one local vjp per row"))


OTHERWISE = {
    "columns": lambda table: table[:, torch.arange(D)][drawn(N)],
    "pairs": lambda table: table[drawn(N, S), torch.randint(0, D, (N, S))],
    "a mask": lambda table: table[torch.arange(V) < N],
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_other_indices_are_exact_all_the_same(name: str) -> None:
    model = Table(OTHERWISE[name])
    params, engine = trained(model), mtu.Engine(model)
    for _ in range(3):
        loss = model().pow(3).flatten(1).sum(1)
        J = truth_of({"a": loss}, params)
        assert_rows(engine.rows(loss), J, params, 1e-12)

"""A table that is looked up and is the head too: exact in any company, and its rows, a table each, are never formed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._ops import gram as op
from mtu_fast._rows import products, together
from mtu_fast._rows.uses import Several
from tests.helpers.checks import assert_rows, joined, trained, truth_of
from tests.test_memory import Live

V, D, N, S = 60, 8, 4, 5
ROW = V * D * 8
EXACT = 1e-11


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of a hundred numbers are large ones: what is said of those takes seconds with true ones."""
    monkeypatch.setattr(together, "SMALL", 100)


class Language(nn.Module):
    """Logits `[N, S, V]` of tokens `[N, S]`, embedding and head one matrix."""

    def __init__(self, vocabulary: int = V, width: int = D, bias: bool = False) -> None:
        super().__init__()
        self.tokens, self.mix = (
            nn.Embedding(vocabulary, width, padding_idx=3),
            nn.Linear(width, width),
        )
        self.shift = nn.Parameter(torch.randn(vocabulary)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.tokens(x))), self.tokens.weight, self.shift)


def tokens(n: int = N, s: int = S, vocabulary: int = V) -> Tensor:
    """Some occur often, some once."""
    return torch.where(
        torch.rand(n, s) < 0.5, torch.randint(0, 9, (n, s)), torch.randint(0, vocabulary, (n, s))
    )


def losses(net: Language, x: Tensor, tasks: int = 1) -> dict[str, Tensor]:
    """{task: mean cross-entropy of the token one, two … ahead, `[N]`}."""
    y = net(x).transpose(1, 2)
    return {
        f"{t + 1} ahead": F.cross_entropy(y[..., : -1 - t], x[:, 1 + t :], reduction="none").mean(1)
        for t in range(tasks)
    }


@pytest.fixture(params=["factors", "tiles"])
def no_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whoever asks for the rows of a sum of kinds fails: for any of them, or for more than a tile."""
    by_tiles = request.param == "tiles"
    monkeypatch.setattr(op, "rows_pay_for_table", lambda *_: by_tiles)
    monkeypatch.setattr(products, "ROWS_IN_CACHE", 1)
    for name in ("matrix", "dense", "grounded") + (() if by_tiles else ("columns",)):
        monkeypatch.setattr(Several, name, None)
    return "explicit rows" if by_tiles else "entries that occur"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tasks", [1, 2])
def test_rows_of_one_forward(tasks: int, bias: bool, no_rows: str) -> None:
    net, x = Language(bias=bias).double(), tokens()
    engine, params = mtu.Engine(net), trained(net)
    for _step in range(2):
        rows = engine.rows(losses(net, x, tasks))
        line = next(line for line in engine.explain().lines if line.name == "tokens.weight")
        assert (line.kept, line.slow) == ("factors", False)
        assert no_rows in line.route
        assert line.bytes < tasks * N * ROW
        assert_rows(rows, truth_of(losses(net, x, tasks), params), params, EXACT)


@pytest.mark.usefixtures("no_rows")
def test_two_forwards_of_unequal_size() -> None:
    """The second one has lookups of its own only: its head is another matrix."""
    net, a, b = Language().double(), tokens(), tokens(2, 5)
    engine, params = mtu.Engine(net), trained(net)

    def looked_up() -> Tensor:
        return net.tokens(b).square().sum((1, 2))

    for second in (lambda: losses(net, b, 2), lambda: {"1 ahead": looked_up()}):
        both = mtu.cat(engine.rows(losses(net, a)), engine.rows(second()))
        truth = joined(truth_of(losses(net, a), params), truth_of(second(), params))
        assert_rows(both, truth, params, EXACT)


@pytest.mark.usefixtures("no_rows")
def test_absent_labels() -> None:
    net, x = Language().double(), tokens()
    engine, params = mtu.Engine(net), trained(net)
    there = torch.tensor([True, False, True, True])
    rows = engine.rows(losses(net, x), present={"1 ahead": there})
    truth = truth_of(losses(net, x), params)
    assert_rows(rows, {j: J[there] for j, J in truth.items()}, params, EXACT)


@pytest.mark.usefixtures("no_rows")
def test_rows_that_are_kept_meet_those_of_later_steps() -> None:
    net, x = Language().double(), tokens()
    engine, params = mtu.Engine(net), trained(net)
    kept, before = engine.rows(losses(net, x)).to_subspace(), truth_of(losses(net, x), params)
    with torch.no_grad():
        net.tokens.weight.mul_(1.1)
    other = tokens(3)
    both = mtu.cat(engine.rows(losses(net, other, 2)), kept)
    assert_rows(both, joined(truth_of(losses(net, other, 2), params), before), params, EXACT)


def test_a_step_beside_an_explicit_basis_forms_rows_by_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A basis is explicit, its products with itself are known; the rows of the step are not made so for its sake."""
    net = Language().double()
    engine, subspace = mtu.Engine(net), mtu.Subspace(size=N, basis=True)
    subspace.keep(engine.rows(losses(net, tokens()), forget=True))
    assert subspace.held.basis is not None
    monkeypatch.setattr(Several, "matrix", None)
    monkeypatch.setattr(Several, "grounded", None)
    x = tokens()
    truth = joined(
        truth_of(losses(net, x), trained(net)),
        dict(enumerate(subspace.held.basis.jacobian().values())),
    )
    for _step in range(2):  # the first one finds the products of the basis with itself
        assert_rows(subspace.join(engine.rows(losses(net, x))), truth, trained(net), EXACT)


def test_a_small_table_becomes_rows_where_they_are_smaller() -> None:
    net = Language(vocabulary=5, width=3).double()
    x = tokens(vocabulary=5) % 5
    engine, params = mtu.Engine(net), trained(net)
    rows = engine.rows(losses(net, x))
    assert engine.explain().lines[0].kept == "rows"
    assert_rows(rows, truth_of(losses(net, x), params), params, EXACT)


@pytest.mark.parametrize(("budget", "kept"), [(0, "factors"), (1 << 30, "rows")])
def test_rows_of_a_table_are_for_those_who_ask(budget: int, kept: str) -> None:
    """Many positions: rows would be smaller than the logits' gradients, but these are there while rows are formed."""
    net, x = Language().double(), tokens(s=40)
    engine, params = mtu.Engine(net, memory_budget=budget), trained(net)
    rows = engine.rows(losses(net, x))
    assert engine.explain().lines[0].kept == kept
    assert_rows(rows, truth_of(losses(net, x), params), params, EXACT)


def test_a_step_takes_the_memory_of_a_plain_one() -> None:
    """Large vocabulary, float32: the gradient of the logits is kept where the plain step had three of its size."""
    net, x = Language(6000, 32), tokens(8, 24, 6000)
    engine, forget = mtu.Engine(net), torch.arange(8) % 4 == 0

    def peak(step: Callable[[Tensor], object]) -> int:
        net.zero_grad()
        with Live() as live:
            step(losses(net, x)["1 ahead"])
        return live.peak

    def ours(loss: Tensor) -> object:
        return engine.backward(loss, mtu.OrthoGrad(0.5), forget=forget)

    plain = peak(lambda loss: loss.mean().backward())
    checked = max(peak(ours) for _step in range(3))
    assert checked <= 1.2 * plain
    assert peak(ours) <= 1.05 * plain

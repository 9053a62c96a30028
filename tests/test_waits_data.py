"""Graphs in which data say where rows come from: on a device that runs behind the host nothing is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from benchmarks.notes.small_nets import gpt
from benchmarks.waits import BEFORE, behind, recorded

pytestmark = pytest.mark.usefixtures("one_thread")
N, S, D = 5, 4, 6

# (hidden [N, S, D], which sample and which position each one is handed) -> [N, D]
Pool = Callable[[Tensor, Tensor, Tensor], Tensor]


def indexed(h: Tensor, of: Tensor, at: Tensor) -> Tensor:
    """The last token of each text, as models for classification take it."""
    return h[of, at]


def gathered(h: Tensor, of: Tensor, at: Tensor) -> Tensor:
    places = (of * S + at)[:, None].expand(N, D)
    return h.flatten(0, 1).gather(0, places)


def selected(h: Tensor, of: Tensor, at: Tensor) -> Tensor:
    return h.flatten(0, 1).index_select(0, of * S + at)


def embedded(h: Tensor, of: Tensor, at: Tensor) -> Tensor:
    """Entries of a table that is itself made of rows."""
    return nn.functional.embedding(of * S + at, h.flatten(0, 1))


def added(h: Tensor, of: Tensor, at: Tensor) -> Tensor:
    places = h.new_zeros(N * S, D).index_add(0, of * S + at, h.sum(1))
    return places.view(N, S, D).sum(1)


def strided(h: Tensor, of: Tensor, at: Tensor) -> Tensor:
    """Found by an experiment, in every step."""
    return h.as_strided((N, 2, D), (S * D, D, 1)).sum(1) * (1 + at[:, None])


POOLS = [indexed, gathered, selected, embedded, added, strided]


class Net(nn.Module):
    """A layer at every position, then a pool."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool, self.of = pool, torch.arange(N)
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, 3)
        self.double()

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        out: Tensor = self.head(self.pool(self.body(x).tanh(), self.of, at))
        return out.square().mean(1)


@pytest.fixture
def running_behind() -> Iterator[None]:
    with behind("cpu"):
        yield


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, S, D, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, S, (N,), generator=generator)


def step(engine: mtu.Engine, seed: int) -> mtu.Update:
    engine.model.zero_grad()
    return engine.backward(
        engine.model(*batch(seed)), mtu.OrthoGrad(0.5), forget=torch.arange(N) < 2
    )


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.usefixtures("running_behind")
@pytest.mark.parametrize("pool", POOLS)
def test_positions_that_change_are_no_wait_and_no_error(pool: Pool) -> None:
    engine = mtu.Engine(Net(pool).double())
    for seed in range(BEFORE):
        step(engine, seed).check()
    assert all(known.plan.trials for known in engine._own.plans._known.values())
    assert not recorded(lambda: step(engine, 9)).waits
    found = []
    for seed in range(10, 20):
        step(engine, seed).check()
        found.append(grads(engine.model))
    fresh = mtu.Engine(engine.model)
    with fresh.waiting():
        for seed, expected in zip(range(10, 20), found, strict=True):
            step(fresh, seed)
            for g, e in zip(grads(engine.model), expected, strict=True):
                torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("running_behind")
@pytest.mark.parametrize("pool", [indexed, gathered, selected, embedded, added])
@pytest.mark.parametrize("before", [BEFORE + 1, BEFORE + 2])  # its plan is checked, or it is not
def test_what_other_samples_are_handed_is_a_flag(pool: Pool, before: int) -> None:
    """After steps in which each sample was read by itself, two are read by one another."""
    model = Net(pool).double()
    engine = mtu.Engine(model)
    for seed in range(before):
        step(engine, seed).check()

    model.of = torch.tensor([1, 0, 2, 3, 4])
    update = step(engine, 7)
    assert update.unsound is not None and bool(update.unsound)
    assert not any(g.any() for g in grads(model))
    with pytest.raises(RuntimeError, match="moved rows in another way"):
        step(engine, 8)
    for seed in (8, 9):
        step(engine, seed).check()
        assert all(g.any() for g in grads(model))
    # such data are looked at from then on, and no plan is taken for wrong
    (known,) = engine._own.plans._known.values()
    assert known.moves and not known.family.failed


@pytest.mark.usefixtures("running_behind")
def test_samples_that_are_shuffled_from_the_start_are_looked_at() -> None:
    """A model that shuffles in every step is known by its first steps, without an error."""
    engine = mtu.Engine(Net(lambda h, of, at: h[torch.randperm(N)].sum(1)).double())
    for seed in range(12):
        step(engine, seed).check()
        assert all(g.any() for g in grads(engine.model))
    assert any(known.moves for known in engine._own.plans._known.values())


@pytest.mark.usefixtures("running_behind")
def test_a_head_that_is_the_embedding_too() -> None:
    model, losses, count = gpt(2)
    engine, forget = mtu.Engine(model), torch.arange(count) < 2

    def tied() -> None:
        model.zero_grad()
        engine.backward(losses(), mtu.OrthoGrad(0.5), forget=forget)

    for _ in range(BEFORE):
        tied()
    assert not recorded(tied).waits


@pytest.mark.parametrize("flat", [False, True])
def test_negatives_of_other_samples_are_rows_by_rule(flat: bool) -> None:
    """A position of each sample, and one of another: rows meet nowhere in a batch, wherever they may in others."""
    torch.manual_seed(0)
    first, second = nn.Linear(D, D).double(), nn.Linear(D, D).double()
    model = nn.Sequential(first, nn.Tanh(), second)
    engine = mtu.Engine(model)
    for seed in range(8):
        x, at = batch(seed)
        others = torch.arange(N).roll(1 + seed % (N - 1))
        h = model(x)
        if flat:
            h = h.flatten(0, 1)
            mine, theirs = h[torch.arange(N) * S + at // 2], h[others * S + 2 + at // 2]
        else:
            mine, theirs = h[torch.arange(N), at // 2], h[others, 2 + at // 2]
        losses = (mine - theirs).square().mean(1)
        grads = [
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for loss in losses
        ]
        J = torch.stack([torch.cat([g.flatten() for g in of_row]) for of_row in grads])
        torch.testing.assert_close(engine.rows(losses).gram(), J @ J.T, rtol=1e-10, atol=1e-12)
        assert "SLOW" not in str(engine.explain())


@pytest.mark.usefixtures("running_behind")
def test_texts_longer_than_the_batch_is_large() -> None:
    """Each is read at a position of its own, which would tell the sample as well as its number does."""
    length, head = 8, nn.Linear(D, 3).double()
    model = nn.ModuleList([nn.Linear(D, D).double(), head])
    engine, of = mtu.Engine(model), torch.arange(N)
    forget = of < 2

    def taken(seed: int) -> mtu.Update:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(N, length, D, dtype=torch.float64, generator=generator)
        hidden = model[0](x).tanh()[of, torch.randperm(length, generator=generator)[:N]]
        model.zero_grad()
        return engine.backward(head(hidden).square().mean(1), mtu.OrthoGrad(0.5), forget=forget)

    for seed in range(BEFORE):
        taken(seed).check()
    assert not recorded(lambda: taken(9)).waits


@pytest.mark.usefixtures("running_behind")
def test_data_that_move_rows_otherwise() -> None:
    """First a flag; from then on the device is looked at, and every step is exact."""
    table, order = nn.Parameter(torch.randn(5, 3)), torch.tensor([0, 1, 2, 3, 4])
    model = nn.ParameterList([table])
    engine = mtu.Engine(model)
    scatter = torch.zeros(5, 3)

    def step() -> mtu.Update:
        table.grad = None
        h = (torch.randn(5, 3) * table).cumsum(1)
        moved = scatter.scatter_add(0, order[:, None].expand(5, 3), h)
        return engine.backward(moved.square().sum(1), mtu.OrthoGrad(0.5), forget=order < 2)

    for _ in range(3):
        step().check()
    trials = [known.plan.trials for known in engine._own.plans._known.values()]
    assert any(trials), "structure knows this by now; take another op"
    order.copy_(torch.tensor([1, 0, 2, 3, 4]))
    update = step()
    assert update.unsound is not None and bool(update.unsound) and not table.grad.any()
    with pytest.raises(RuntimeError, match="moved rows in another way"):
        step()
    for swap in ([1, 0, 2, 3, 4], [4, 3, 2, 1, 0]):
        order.copy_(torch.tensor(swap))
        step().check()
        assert table.grad.any()

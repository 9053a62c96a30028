"""Rows that a method sees by their mean alone: the update is that of all rows, with fewer of them multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtu_fast as mtu
from benchmarks.models import Sizes, build
from mtu_fast._rows import own, pool
from mtu_fast.errors import NotFiniteError
from mtu_fast.methods import FORGET, RESTING, RETAIN, Roles
from tests.helpers.truth import relative_error

N = 24
MODELS = ["transformer", "resnet", "vit", "depthwise"]
Losses = Callable[[], dict[str, Tensor]]
Step = Callable[[mtu.Engine, Losses, int], mtu.Update]


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Whether this few rows are many."""

    def decide(pooled: bool) -> None:
        monkeypatch.setattr(pool, "MANY", 2 if pooled else 10**9)
        if not pooled:  # beside kept rows, however few
            monkeypatch.setattr(own, "kept_of", lambda parts, shared: 0)

    yield decide


def halves(step: int) -> Tensor:
    return (torch.arange(N) + step) % 2 == 0


def some_tasks(step: int) -> dict[str, Tensor]:
    """Another half for each of two tasks."""
    return {"task0": halves(step), "task1": halves(step + 1)}


def full_task(method: mtu.Method) -> Step:
    return lambda engine, losses, step: engine.backward(losses(), method, forget=halves(step))


def partial_task(method: mtu.Method) -> Step:
    return lambda engine, losses, step: engine.backward(losses(), method, forget=some_tasks(step))


def unlabelled(method: mtu.Method) -> Step:
    def step(engine: mtu.Engine, losses: Losses, at: int) -> mtu.Update:
        named = losses()
        present = {task: torch.arange(N) % 3 != t for t, task in enumerate(named)}
        return engine.backward(named, method, forget=halves(at), present=present)

    return step


def two_calls(method: mtu.Method) -> Step:
    """Rows of two calls of unequal size, in which a task's rows to forget are of both."""

    def step(engine: mtu.Engine, losses: Losses, at: int) -> mtu.Update:
        del at
        parts = []
        for k, some in enumerate((slice(0, 7), slice(7, N))):
            part = {task: loss[some] for task, loss in losses().items()}
            parts.append(engine.rows(part, forget=torch.arange(N)[some] % (k + 2) == 0))
        return mtu.cat(*parts).backward(method)

    return step


def in_subspace() -> Step:
    subspace, method = mtu.Subspace(), mtu.InterferenceAware(0.3, retain="target")

    def step(engine: mtu.Engine, losses: Losses, at: int) -> mtu.Update:
        most = (torch.arange(N) + at) % 4 != 0
        mask = {"task0": most, "task1": most.flip(0)}
        return engine.backward(losses(), method, forget=mask, subspace=subspace)

    return step


def with_memory(**how: Any) -> Step:
    """Retain rows of earlier steps, and some rows to forget at rest."""
    memory, method = mtu.Memory(size=N, **how), mtu.LevelledOrthoGrad(0.4)

    def step(engine: mtu.Engine, losses: Losses, at: int) -> mtu.Update:
        kinds = torch.where(halves(at), FORGET, RETAIN)
        kinds[:6] = torch.where(kinds[:6] == FORGET, RESTING, RETAIN)
        named = losses()
        return engine.backward(
            named, method, forget=dict.fromkeys(named, kinds.to(torch.int8)), memory=memory
        )

    return step


STEPS: dict[str, Callable[[], Step]] = {
    "full": lambda: full_task(mtu.OrthoGrad(0.5)),
    "partial": lambda: partial_task(mtu.OrthoGrad(0.2)),
    "unlabelled": lambda: unlabelled(mtu.OrthoGrad(0.5)),
    "two calls": lambda: two_calls(mtu.OrthoGrad(0.5)),
    "by layer": lambda: full_task(mtu.OrthoGrad(0.5, granularity="layer")),
    "by tensor": lambda: partial_task(mtu.OrthoGrad(0.5, granularity="tensor")),
    "subspace": in_subspace,
    "memory": with_memory,
    "most conflicting": lambda: with_memory(keep="conflicting"),
}


def trained(name: str, tasks: int, step: Step, steps: int) -> tuple[list[Tensor], list[mtu.Update]]:
    """Gradients of all parameters, heads among them, and updates of a few steps of SGD."""
    case = build(name, tasks, True, sizes=Sizes(samples=N), smooth=True, dtype=torch.float64)
    engine = mtu.Engine(case.model, list(case.params.values()))
    found, updates = [], []
    for at in range(steps):
        case.model.zero_grad()
        updates.append(step(engine, case.losses, at))
        grads = [p.grad for p in case.model.parameters() if p.grad is not None]
        found.append(torch.cat([g.flatten() for g in grads]))
        with torch.no_grad():
            for p in case.model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=1e-2)
    return found, updates


def compared(
    name: str, tasks: int, make: Callable[[], Step], many: Callable[[bool], None], steps: int = 3
) -> None:
    many(False)
    expected, of_all = trained(name, tasks, make(), steps)
    many(True)
    found, of_pools = trained(name, tasks, make(), steps)
    for mine, truth in zip(found, expected, strict=True):
        assert relative_error(mine, truth) <= 1e-9
    for update, whole in zip(of_pools, of_all, strict=True):
        assert update.gram is not None and whole.gram is not None and whole.into is None
        assert update.gram.shape[-1] == len(update.seen or ()) < whole.gram.shape[-1]
        if (
            whole.gram.dim() == 2
        ):  # of one tensor rows depend on one another, and their weights are not unique
            assert relative_error(update.weights, whole.weights) <= 1e-9
        assert update.rank is not None and torch.equal(update.rank, whole.rank)


@pytest.mark.parametrize("step", STEPS)
def test_every_way_of_a_step(step: str, many: Callable[[bool], None]) -> None:
    compared("transformer", 3, STEPS[step], many)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tasks", [1, 3])
def test_every_kind_of_rows(name: str, tasks: int, many: Callable[[bool], None]) -> None:
    compared(name, tasks, STEPS["full"], many, steps=2)  # nothing is kept between steps


class Odd(nn.Module):
    """A table that is the head too, a weight behind a view, one without positions, and a penalty on it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.mix = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(F.linear(self.table(ids), self.mix.weight.T, self.mix.bias)) * self.scale
        logits = h @ self.table.weight.T
        loss = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)
        return loss + 0.1 * self.mix.weight.square().sum()


def test_tables_views_and_penalties(many: Callable[[bool], None]) -> None:
    found = {}
    for pooled in (False, True):
        many(pooled)
        torch.manual_seed(1)
        model = Odd().double()
        engine, grads = mtu.Engine(model), []
        for step in range(4):
            model.zero_grad()
            ids = torch.randint(30, (N, 5), generator=torch.Generator().manual_seed(step))
            update = engine.backward(model(ids), mtu.OrthoGrad(0.5), forget=halves(step))
            assert update.gram is not None and len(update.gram) == (N // 2 + 1 if pooled else N)
            grads += [
                torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            ]
            with torch.no_grad():
                for p in model.parameters():
                    assert p.grad is not None
                    p.sub_(p.grad, alpha=0.1)
        found[pooled] = torch.stack(grads)
    assert relative_error(found[True], found[False]) <= 1e-10


def test_rows_that_are_not_many_or_not_averaged_stay(many: Callable[[bool], None]) -> None:
    case = build("vit", 2, True, sizes=Sizes(samples=N))
    engine = mtu.Engine(case.model, list(case.params.values()))
    assert pool.MANY <= 2 * N  # the module's own: this is many
    for method in (mtu.PCGrad(), mtu.UPGrad()):
        case.model.zero_grad()
        update = engine.rows(case.losses(), forget=halves(0)).backward(method, check=False)
        assert update.into is None and update.gram is not None and len(update.gram) == 2 * N
    case.model.zero_grad()
    few = engine.backward(case.losses(), mtu.OrthoGrad(), forget=torch.arange(N) < 2)
    assert few.into is None and few.gram is not None and len(few.gram) == 2 * N
    case.model.zero_grad()
    half = engine.backward(case.losses(), mtu.OrthoGrad(), forget=halves(0))
    assert half.into is not None and half.gram is not None and len(half.gram) == N + 2


def test_rank_one_rows_stay() -> None:
    """Sums of them would save no product."""
    case = build("mlp", 2, True, sizes=Sizes(samples=2 * N))
    engine = mtu.Engine(case.model, list(case.params.values()))
    for step in range(3):
        case.model.zero_grad()
        forget = (torch.arange(2 * N) + step) % 2 == 0
        update = engine.backward(case.losses(), mtu.OrthoGrad(), forget=forget)
        assert update.into is None and update.gram is not None and len(update.gram) == 4 * N


def test_what_a_method_sees(many: Callable[[bool], None]) -> None:
    """Means of losses, and their Gram: S G Sᵀ."""
    many(True)
    case = build("vit", 2, True, sizes=Sizes(samples=N), dtype=torch.float64)
    engine = mtu.Engine(case.model, list(case.params.values()))
    mask = {"task0": halves(0), "task1": torch.arange(N) < 4}
    losses = case.losses()
    whole = engine.rows(losses, forget=mask)
    G, loss = whole.gram(), whole.roles.loss
    update = engine.backward(case.losses(), mtu.OrthoGrad(), forget=mask)
    assert update.into is not None and update.seen is not None and update.gram is not None
    S = F.one_hot(update.into).double().T
    S /= S.sum(1, keepdim=True)
    assert relative_error(update.gram, S @ G @ S.T) <= 1e-12
    assert relative_error(update.seen.loss, S @ loss) <= 1e-12
    assert (update.seen.kind == FORGET).sum() == 2
    means = update.seen.sample == -1
    assert torch.equal(means, update.seen.kind == FORGET)
    assert torch.equal(update.seen.sample[~means], whole.roles.sample[whole.roles.kind == RETAIN])


def test_a_row_that_is_not_finite_is_named(many: Callable[[bool], None]) -> None:
    many(True)
    model = nn.Linear(4, 1)
    x = torch.randn(N, 4)
    x[6] = 0.0
    engine = mtu.Engine(model)
    with pytest.raises(NotFiniteError, match=r"to forget \[\('loss', 6\)\]"):
        engine.backward((x @ model.weight[0]).square().sqrt(), mtu.OrthoGrad(), forget=halves(0))
    assert model.weight.grad is None


@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.OrthoGrad(granularity="layer")])
@pytest.mark.parametrize("tasks", [1, 2])
def test_where_all_rows_rest_nothing_moves(method: mtu.Method, tasks: int) -> None:
    case = build("vit", tasks, True, sizes=Sizes(samples=2 * N))
    engine = mtu.Engine(case.model, list(case.params.values()))
    resting = torch.full((2 * N,), RESTING, dtype=torch.int8)
    for at_rest in (2 * N, N, 2 * N):  # all rows are many: pooled where some are left
        kinds = torch.where(torch.arange(2 * N) < at_rest, resting, FORGET)
        case.model.zero_grad()
        named = case.losses()
        update = engine.backward(named, method, forget=dict.fromkeys(named, kinds))
        assert len(update.roles) == tasks * 2 * N
        moved = [bool(p.grad.any()) for p in case.params.values() if p.grad is not None]
        assert any(moved) == (at_rest < 2 * N)


class ByLoss(mtu.OrthoGrad):
    """Weights of a method that averages, changed by what only rows have."""

    def outside(self, roles: Roles) -> Tensor:
        return super().outside(roles)

    def with_rank(self, G: Tensor, roles: Roles) -> tuple[Tensor, Tensor]:
        w, rank = super().with_rank(G, roles)
        return w * (roles.loss < roles.loss.median()), rank


class Said(ByLoss):
    averages_forget = True


def test_a_class_that_changes_weights_says_anew_that_it_averages(
    many: Callable[[bool], None],
) -> None:
    many(True)
    case = build("vit", 1, True, sizes=Sizes(samples=N))
    engine = mtu.Engine(case.model, list(case.params.values()))
    for method, rows in ((ByLoss(), N), (Said(), N // 2 + 1), (mtu.OrthoGrad(), N // 2 + 1)):
        case.model.zero_grad()
        update = engine.backward(case.losses(), method, forget=halves(0))
        assert update.gram is not None and len(update.gram) == rows


@pytest.mark.parametrize("form", [property, classmethod, staticmethod, cached_property])
def test_whatever_the_form_in_which_it_is_changed(form: Callable[[Any], object]) -> None:
    changed = type("Changed", (mtu.OrthoGrad,), {"outside": form(mtu.OrthoGrad.outside)})
    plain = type("Plain", (mtu.OrthoGrad,), {"__doc__": "The same.", "label": "mine"})
    assert not pool._averages(changed)
    assert pool._averages(plain)


def averaging() -> list[type[mtu.Method]]:
    found = [getattr(mtu.methods, name) for name in mtu.methods.__all__]
    return [m for m in found if isinstance(m, type) and getattr(m, "averages_forget", False)]


def test_some_methods_average() -> None:
    assert {mtu.OrthoGrad, mtu.InterferenceAware, mtu.LevelledOrthoGrad} <= set(averaging())


@pytest.mark.parametrize("kind", averaging(), ids=lambda m: m.__name__)
@pytest.mark.parametrize("seed", range(5))
def test_a_method_that_says_so_does_not_tell_rows_from_their_mean(
    kind: type[mtu.Method], seed: int
) -> None:
    """w(G) = Sᵀ w(S G Sᵀ), and so are the weights outside."""
    torch.manual_seed(seed)
    R, T = 60, 3
    J = torch.randn(R, 50, dtype=torch.float64)
    given = torch.where(torch.rand(R) < 0.7, FORGET, RETAIN)
    given[:16] = mtu.SUBSPACE
    given[16:20] = RESTING
    loss = torch.rand(R, dtype=torch.float64)
    roles = Roles(
        torch.randint(T, (R,)), torch.arange(R), given, loss, ("a", "b", "c"), torch.float64
    )
    method = kind(0.3)  # type: ignore[call-arg]
    made = pool.pool_for(method, roles)
    assert made is not None
    S = F.one_hot(made.into + 1).double().T[1:] / made.counts[:, None]
    expected = method(J @ J.T, roles)
    found = made.spread(method(S @ J @ J.T @ S.T, made.roles))
    assert relative_error(J.T @ found, J.T @ expected) <= 1e-8
    assert relative_error(made.spread(method.outside(made.roles)), method.outside(roles)) <= 1e-12

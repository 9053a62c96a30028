"""Hooks and backwards of somebody's own: a row is what a backward of its loss alone gives, or the model is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._graph import hooks, trial
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.hooks import first_hook
from tests.helpers.checks import assert_rows, trained
from tests.helpers.truth import jacobian
from tests.random_models.functions import Changed

N, WIDTH = 5, 4
SCALES = [1e-6, 1.0, 1e6]
Change = Callable[[Tensor], "Tensor | None"]

pytestmark = pytest.mark.filterwarnings("ignore:rows. a hook sees:RuntimeWarning")


def guarded(g: Tensor) -> Tensor:
    """Nothing of a gradient that is not finite anywhere."""
    return g if bool(torch.isfinite(g).all()) else torch.zeros_like(g)


def clipped(g: Tensor, most: float = 1e-2) -> Tensor | None:
    """At most of this norm; left alone below it."""
    norm = g.norm()
    return g * (most / norm) if norm > most else None


def looked(g: Tensor) -> None:
    """Nothing comes of it."""
    float(g.norm())


CHANGES: dict[str, Change] = {
    "halves": lambda g: g * 0.5,
    "clamps": lambda g: g.clamp(-1e-3, 1e-3),
    "clips the norm": clipped,
    "clips a large norm": lambda g: clipped(g, 1e5),
    "has norm 1": lambda g: g / (g.norm() + 1e-12),
    "is a share of the largest": lambda g: g / (g.abs().max() + 1e-12),
    "signs": torch.sign,
    "is not NaN": torch.nan_to_num,
    "is guarded": guarded,
    "is nothing where some are large": lambda g: g * float(g.abs().max() < 0.5),
    "centres": lambda g: g - g.mean(0),
    "looks": looked,
    "drops what is small": lambda g: torch.where(g.abs() < 1e-4, 0.0, g),
}
LINEAR = ("halves", "is not NaN", "is guarded", "centres", "looks")


def by_tensor(h: Tensor, change: Change) -> Tensor:
    h = h * 1.0
    h.register_hook(lambda g: None if g is None else change(g))
    return h


def by_node_before(h: Tensor, change: Change) -> Tensor:
    h = h * 1.0

    def hook(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        changed = None if grads[0] is None else change(grads[0])
        return None if changed is None else (changed,)

    assert h.grad_fn is not None
    h.grad_fn.register_prehook(hook)
    return h


def by_node_after(h: Tensor, change: Change) -> Tensor:
    h = h * 1.0

    def hook(grads: Any, _: object) -> Any:
        changed = None if grads[0] is None else change(grads[0])
        return None if changed is None else (changed, *grads[1:])

    assert h.grad_fn is not None
    h.grad_fn.register_hook(hook)
    return h


def by_module(h: Tensor, change: Change) -> Tensor:
    module = nn.Tanh()

    def hook(_: nn.Module, grads: Any, __: object) -> Any:
        changed = None if grads[0] is None else change(grads[0])
        return None if changed is None else (changed,)

    module.register_full_backward_hook(hook)
    return module(h)


def by_module_before(h: Tensor, change: Change) -> Tensor:
    module = nn.Tanh()

    def hook(_: nn.Module, grads: Any) -> Any:
        changed = None if grads[0] is None else change(grads[0])
        return None if changed is None else (changed,)

    module.register_full_backward_pre_hook(hook)
    return module(h)


WAYS: dict[str, Callable[[Tensor, Change], Tensor]] = {
    "tensor": by_tensor,
    "node before": by_node_before,
    "node after": by_node_after,
    "module": by_module,
    "module before": by_module_before,
    "function": lambda h, change: Changed.apply(h, change),
}


class Net(nn.Module):
    """A hook in one of several places: beside a skip, below what couples samples, on a view of a weight."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.first, self.second = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, WIDTH)
        self.last, self.scale = nn.Linear(WIDTH, 2), nn.Parameter(torch.ones(()))
        self.double()

    def forward(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.place == "plain":
            h = change(h)
        if self.place == "skip":
            h = change(h)
            h = torch.tanh(self.second(h)) + h.sin() * self.scale
        if self.place == "below coupling":
            h = change(h)
            h = (self.second(h) - self.second(h).mean(0)) + h.roll(1, 0) + h
        if self.place == "few":
            # what every sample shares comes through one number, and through an edge of its own
            common = change(self.second(h.detach()).mean() * self.scale.sin())
            h = h + common + common * h
        weight = self.third.weight
        if self.place == "weight":
            weight = change(weight.t()).t()
        if self.place == "computed weight":
            weight = change(weight.sin())
        h = torch.tanh(h @ weight + self.third.bias)
        if self.place == "head":
            h = change(h)
        return self.last(h)


PLACES = ("plain", "skip", "below coupling", "few", "weight", "computed weight", "head")


def losses_of(net: Net, change: Callable[[Tensor], Tensor], scale: float) -> dict[str, Tensor]:
    out = net(torch.randn(N, 3, dtype=torch.float64), change)
    return {"a": scale * out[:, 0].square(), "b": scale * (out.sum(1) - 1).square()}


def served(engine: mtu.Engine, net: Net, losses: dict[str, Tensor]) -> bool:
    """Whether the rows were given, and not refused; that they are right is asserted."""
    params = trained(net)
    J = jacobian(losses, params)
    try:
        rows = engine.rows(losses)
    except RuntimeError as error:
        assert "not linear" in str(error) or "hook" in str(error)
        return False
    assert_rows(rows, J, params, 1e-9)
    return True


def cases() -> list[tuple[str, str, str]]:
    """Every change in every way in two of the places, all of which occur with each."""
    found = []
    for i, name in enumerate(CHANGES):
        for j, way in enumerate(WAYS):
            found += [(name, way, PLACES[(i + j + k) % len(PLACES)]) for k in (0, 3)]
    return found


def plain(h: Tensor) -> Tensor:
    return h * 1.0


@pytest.mark.parametrize("name, way, place", cases())
def test_rows_are_those_of_one_backward_each(name: str, way: str, place: str) -> None:
    """In several steps of one engine at unlike scales of the losses, the change there at first or set later."""
    for first in (0, 1):
        torch.manual_seed(first)
        net = Net(place)
        engine = mtu.Engine(net)

        def changed(h: Tensor) -> Tensor:
            return WAYS[way](h, CHANGES[name])

        for step, scale in enumerate(SCALES):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                losses = losses_of(net, plain if step < first else changed, scale)
                there = served(engine, net, losses)
            assert there or name not in LINEAR


def blind_to_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "first_hook", lambda graph: None)


def functions_as_adjoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "settled", lambda node, maps, found, *_: found)
    monkeypatch.setattr(trial, "moved", lambda *_: False)


@pytest.mark.parametrize(
    "name, way, place, blind",
    [
        ("clips the norm", "tensor", "below coupling", blind_to_hooks),
        ("clips a large norm", "module", "head", blind_to_hooks),
        ("clips a large norm", "function", "skip", functions_as_adjoints),
    ],
)
def test_the_test_sees_rows_that_are_taken_for_linear(
    name: str,
    way: str,
    place: str,
    blind: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blind(monkeypatch)
    with pytest.raises(AssertionError):
        test_rows_are_those_of_one_backward_each(name, way, place)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "function"])
def test_a_hook_is_found_before_it_does_anything(way: str) -> None:
    """Its node is known, and it is not run with numbers that are nobody's gradient."""
    seen: list[float] = []

    def counts(g: Tensor) -> None:
        seen.append(float(g.norm()))

    net = Net("skip")
    graph = Graph(list(losses_of(net, lambda h: WAYS[way](h, counts), 1.0).values()), trained(net))
    assert first_hook(graph) is not None and seen == []
    graph = Graph(list(losses_of(net, plain, 1.0).values()), trained(net))
    assert first_hook(graph) is None


def test_what_is_said_of_a_hook() -> None:
    net = Net("skip")
    engine = mtu.Engine(net)
    with pytest.warns(RuntimeWarning, match=r"hook sees the gradient at MulBackward0 .*exact and"):
        engine.rows(losses_of(net, lambda h: by_tensor(h, CHANGES["halves"]), 1.0))
    (site,) = engine.explain().lines[0].sites
    assert site == "one backward per row, since a hook sees the gradient at MulBackward0"
    with pytest.raises(RuntimeError, match=r"there is a hook at MulBackward0, and .*not linear"):
        engine.rows(losses_of(net, lambda h: by_tensor(h, CHANGES["clamps"]), 1.0))
    engine.rows(losses_of(net, plain, 1.0))
    assert not any(line.slow for line in engine.explain().lines)


def test_a_function_that_is_linear_stays_fast() -> None:
    net = Net("skip")
    engine = mtu.Engine(net)
    for _step in range(2):
        engine.rows(losses_of(net, lambda h: Changed.apply(h, CHANGES["halves"]), 1.0))
        assert not any(line.slow for line in engine.explain().lines)


def test_hooks_are_looked_for_only_where_one_may_have_been_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Graph] = []

    def find(graph: Graph) -> int | None:
        asked.append(graph)
        return first_hook(graph)

    monkeypatch.setattr(hooks, "first_hook", find)
    net, counts = Net("skip"), []
    engine = mtu.Engine(net)
    for step in range(4):
        if step == 3:
            net.register_forward_hook(lambda *_: None)
        both = [losses_of(net, plain, 1.0) for _ in range(2)]
        for losses in both:
            engine.rows(losses)
            counts.append(len(asked))
    assert counts == [1, 2, 2, 2, 2, 2, 3, 4]


def test_a_hook_on_the_second_of_two_graphs_that_are_alike() -> None:
    """Both are there before rows of the first are taken."""
    net = Net("skip")
    engine = mtu.Engine(net)
    for _step in range(3):
        first, second = (losses_of(net, plain, 1e3) for _ in range(2))
        assert served(engine, net, first) and served(engine, net, second)
    first = losses_of(net, plain, 1e3)
    second = losses_of(net, lambda h: by_tensor(h, CHANGES["clips the norm"]), 1e3)
    assert served(engine, net, first)
    served(engine, net, second)
    assert any(line.slow for line in engine.explain().lines) or not served(engine, net, second)


def test_a_hook_on_a_view_of_a_weight_that_outlives_its_step() -> None:
    """Used later than it was set, by a graph of a signature that is known."""
    layer = nn.Linear(4, 4).double()
    engine, hooked = mtu.Engine(layer), layer.weight.t()
    hooked.register_hook(lambda g: g / g.norm())
    x = torch.randn(N, 4, dtype=torch.float64)
    for _step in range(3):
        engine.rows((x @ layer.weight.t()).square().sum(1))
    with pytest.raises(RuntimeError, match="there is a hook at TBackward0"):
        engine.rows((x @ hooked).square().sum(1))

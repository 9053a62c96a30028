"""Graphs that are compared with those of earlier steps: alike in all that a plan rests on, or walked anew."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
from torch import Tensor, nn

from mtu_fast._graph.graph import Graph
from tests.graph.steps import N, double
from tests.helpers.checks import trained, twin
from tests.helpers.zoo import by_name


class Net(nn.Module):
    """Layers of one shape, which a forward may join in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4).double() for _ in range(3)])
        self.head = nn.Linear(4, 4).double()

    def __getitem__(self, i: int) -> nn.Module:
        return self.layers[i]


def _steps(net: Net, x: Tensor, first: int, second: int) -> Tensor:
    return net[second](net[first](x).tanh()).square().sum(1)


# what one step makes of the net, and another that must not be taken for it
PAIRS: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[Net, Tensor], Tensor]]] = {
    "another parameter": (lambda n, x: _steps(n, x, 0, 1), lambda n, x: _steps(n, x, 0, 2)),
    "parameters exchanged": (lambda n, x: _steps(n, x, 0, 1), lambda n, x: _steps(n, x, 1, 0)),
    "one layer for two": (lambda n, x: _steps(n, x, 0, 1), lambda n, x: _steps(n, x, 0, 0)),
    "one node for two": (
        lambda n, x: (n[0](x).exp() * n[0](x).exp()).sum(1),
        lambda n, x: (y := n[0](x).exp(), (y * y).sum(1))[1],
    ),
    "another size": (lambda n, x: n[0](x).sum(1), lambda n, x: n[0](x[1:]).sum(1)),
    "another dimension": (
        lambda n, x: n[0](x).cumsum(0).sum(1),
        lambda n, x: n[0](x).cumsum(1).sum(1),
    ),
    "another op": (lambda n, x: n[0](x).tanh().sum(1), lambda n, x: n[0](x).exp().sum(1)),
    "another output": (
        lambda n, x: n[0](x).chunk(2, 1)[0].sum(1),
        lambda n, x: n[0](x).chunk(2, 1)[1].sum(1),
    ),
    "another precision": (
        lambda n, x: n[0](x).double().sum(1),
        lambda n, x: n[0](x).float().double().sum(1),
    ),
    "an input with a gradient": (
        lambda n, x: n[0](x).sum(1),
        lambda n, x: n[0](x.clone().requires_grad_()).sum(1),
    ),
    "a frozen side": (
        lambda n, x: (n[0](x) + n[1](x)).sum(1),
        lambda n, x: (n[0](x) + n[1](x).detach()).sum(1),
    ),
    "a parameter outside": (
        lambda n, x: n[1](n[0](x)).sum(1),
        lambda n, x: n.head(n[0](x)).sum(1),
    ),
}


def _graph(losses: list[Tensor], parameters: list[nn.Parameter], *seen: Graph) -> Graph:
    return Graph(losses, parameters, [each.pattern for each in seen])


@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied_language_model", "vit"])
def test_a_graph_is_numbered_by_one_of_before_as_if_it_were_walked(name: str) -> None:
    model, forward = by_name(name).build(2, N)
    shared = trained(model)
    first = _graph(list(forward().values()), shared)
    for step in (forward, twin(by_name(name), model, 2, N)):
        losses = list(step().values())
        again, anew = _graph(losses, shared, first), _graph(losses, shared)
        assert again.pattern is first.pattern
        assert len(again.nodes) == len(anew.nodes)
        assert all(a is b for a, b in zip(again.nodes, anew.nodes, strict=True))
        assert all(a is b for a, b in zip(again.leaves, anew.leaves, strict=True))
        assert (again.next, again.leaf, again.wanted) == (anew.next, anew.leaf, anew.wanted)
        assert again.signature() == anew.signature()


@pytest.mark.parametrize("what", PAIRS)
def test_a_graph_that_differs_is_walked(what: str) -> None:
    net, (one, other) = Net(), PAIRS[what]
    shared = list(net.layers.parameters())
    first = _graph([one(net, double(N, 4))], shared)
    assert _graph([one(net, double(N, 4))], shared, first).pattern is first.pattern
    second = _graph([other(net, double(N, 4))], shared, first)
    assert second.pattern is not first.pattern
    assert second.names == _graph([other(net, double(N, 4))], shared).names
    # the other way round, and with both known
    third = _graph([one(net, double(N, 4))], shared, second)
    assert third.pattern is not second.pattern
    assert _graph([one(net, double(N, 4))], shared, second, first).pattern is first.pattern


def test_losses_in_another_order_are_another_graph() -> None:
    net = Net()
    shared = list(net.layers.parameters())

    def losses() -> list[Tensor]:
        h = net[0](double(N, 4))
        return [h.sum(1), net[1](h).sum(1)]

    first = _graph(losses(), shared)
    assert _graph(losses(), shared, first).pattern is first.pattern
    assert _graph(losses()[::-1], shared, first).pattern is not first.pattern
    assert _graph(losses()[1:], shared, first).pattern is not first.pattern


def test_a_pattern_holds_nothing_of_a_step() -> None:
    net, x = Net(), double(N, 4)
    loss = _steps(net, x, 0, 1)
    pattern = _graph([loss], list(net.layers.parameters())).pattern
    held = weakref.ref(x)  # saved by the first layer
    del loss, x
    assert held() is None
    assert "AddmmBackward0" in pattern.names

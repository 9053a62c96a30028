"""Plans of recorded graphs: what a signature remembers, and graphs of unusual kinds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._graph.graph import Graph
from tests.graph.steps import N, S, discoveries, double, steps
from tests.helpers.checks import assert_rows, trained, truth_of, twin
from tests.helpers.zoo import by_name


def test_a_plan_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net, found = (
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double(),
        discoveries(monkeypatch),
    )
    steps(net, (net(double(N, S, 3)).square().mean((1, 2)) for _ in range(5)))
    assert len(found) == 1


def test_an_input_that_requires_grad_is_left_alone() -> None:
    net, x = nn.Linear(3, 4).double(), double(N, 3).requires_grad_()
    mtu.Engine(net).backward(net(x).square().sum(1), mtu.OrthoGrad(), forget=torch.arange(N) == 1)
    assert x.grad is None and net.weight.grad is not None


def test_a_signature_tells_graphs_apart() -> None:
    model, forward = by_name("mlp").build(2, N)
    engine_parameters = trained(model)

    def key(losses: dict[str, Tensor]) -> object:
        return Graph(list(losses.values()), engine_parameters).signature()

    again, other = key(forward()), key(twin(by_name("mlp"), model, 2, N)())
    assert key(forward()) == again == other
    assert hash(again) == hash(other)
    assert again != key(twin(by_name("mlp"), model, 2, N - 1)())
    assert again != key({"a": forward()["a"]})
    assert again != key({name: 2 * loss for name, loss in forward().items()})


@pytest.mark.parametrize("way", ["checkpoint", "offload"])
@pytest.mark.parametrize("first", [False, True])
def test_saved_tensors_that_are_packed_in_some_steps(way: str, first: bool) -> None:
    """The graph is the same; only reading what it saved runs code, and may need the whole graph."""
    from torch.utils.checkpoint import checkpoint

    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()

    def forward(x: Tensor, packed: bool) -> Tensor:
        if packed and way == "checkpoint":
            return checkpoint(net, x, use_reentrant=False)
        if packed:
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: t.detach().numpy(), torch.from_numpy
            ):
                return net(x)
        return net(x)

    steps(
        net, (forward(double(N, 3), packed).square().sum(1) for packed in (first, not first, first))
    )


def test_nested_tensors_take_a_backward_a_row() -> None:
    """Exact, and said to be slow: their samples have no shape in common."""
    net = nn.Linear(3, 4).double()
    engine, params = mtu.Engine(net), trained(net)
    for lengths in ((2, 4, 1), (3, 3, 2)):
        x = torch.nested.nested_tensor([double(n, 3) for n in lengths], layout=torch.jagged)
        loss = torch.stack([part.square().mean() for part in net(x).unbind()])
        J = truth_of({"loss": loss}, params)
        assert_rows(engine.rows(loss), J, params, 1e-12)
        assert all(line.slow for line in engine.explain().lines)


@pytest.mark.parametrize("way", ["a scalar a sample", "one entry for all"])
def test_scalars_on_the_way(way: str) -> None:
    """Losses stacked from numbers, and a table that all samples look up at one place."""
    net = nn.Linear(3, 4).double()
    net.register_parameter("w", nn.Parameter(double(3)))
    net.register_parameter("table", nn.Parameter(double(7, 4)))

    def losses() -> Iterator[Tensor]:
        for _step in range(3):
            if way == "a scalar a sample":
                yield torch.stack([torch.tanh(x @ net.w) + net(x).norm() for x in double(N, 3)])
            else:
                entry = F.embedding(torch.tensor(2), net.table) + net.table.index_select(
                    0, torch.tensor(3)
                )
                yield (net(double(N, 3)) * entry).sum(1).square()

    steps(net, losses(), by_rule=False)

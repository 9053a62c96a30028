"""Rules by their public names: what a user writes serves, and is checked."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from examples.own_rule import ExpScale
from mtu_fast import rules
from tests.helpers.checks import assert_rows, trained, truth_of

N, D = 5, 4


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    known = dict(rules.RULES)
    yield
    rules.RULES.clear()
    rules.RULES.update(known)


class LookUpTimes(torch.autograd.Function):
    """`(table[index] @ W, index)`: two parameters at one node. index `[N, S]`, table `[V, D]`, W `[D, K]`."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, table: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(index, table, W)
        return table[index] @ W

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[None, Tensor, Tensor]:
        index, table, W = ctx.saved_tensors
        found = torch.zeros_like(table).index_put((index,), b @ W.mT, accumulate=True)
        return None, found, torch.einsum("nsd,nsk->dk", table[index], b)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.W = nn.Parameter(torch.randn(7, D)), nn.Parameter(torch.randn(D, D))
        self.gain = nn.Parameter(torch.randn(D))

    def forward(self, index: Tensor) -> Tensor:
        x: Tensor = LookUpTimes.apply(index, self.table, self.W)
        return ExpScale.apply(x.sum(1), self.gain).square().sum(1)


def slow(engine: mtu.Engine) -> list[str]:
    return [line.name for line in engine.explain().lines if line.slow]


def checked(model: nn.Module, index: Tensor) -> mtu.Engine:
    """An engine that took rows, which are those of autograd."""
    engine, params = mtu.Engine(model), trained(model)
    assert_rows(engine.rows(model(index)), truth_of({"a": model(index)}, params), params, 1e-12)
    return engine


def in_the_docstring() -> str:
    """The code that the module shows."""
    start = rules.__doc__.index("    from mtu_fast.rules import")
    return textwrap.dedent(rules.__doc__[start : rules.__doc__.index("\n\nWhat a rule is given")])


def test_five_lines_are_a_rule() -> None:
    model, index = Net().double(), torch.randint(7, (N, 3))
    assert slow(checked(model, index)) == ["table", "W", "gain"]
    code = in_the_docstring()
    assert len([line for line in code.splitlines() if line]) == 5
    exec(code, {})
    assert slow(checked(model, index)) == ["table", "W"]


def test_an_entry_serves_inputs_that_share_work() -> None:
    @rules.RULES.entry("LookUpTimesBackward")
    def look_up_times(
        node: Any,
        wanted: Mapping[int, tuple[int, ...]],
        grads: Sequence[Tensor | None],
        maps: Sequence[rules.RowMap | None],
    ) -> dict[int, rules.Use]:
        (b,), (rows,) = grads, maps
        if b is None or rows is None or rows.dim != 0:
            return {}
        index, table, W = (t.detach() for t in node.saved_tensors)
        at, out = (rows.split(t, 0).flatten(1, 2) for t in (index, b))
        made = {
            1: rules.Gather(table.shape, at, out @ W.mT),
            2: rules.Outer(W.shape, table[at], out),
        }
        return {slot: made[slot] for slot in wanted}

    assert slow(checked(Net().double(), torch.randint(7, (N, 3)))) == ["gain"]


def test_a_wrong_rule_is_found() -> None:
    @rules.rule("ExpScaleBackward", slots=(1,))
    def forgets_the_derivative(
        node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: rules.RowMap
    ) -> rules.Use | None:
        return rules.summed(b * node.saved_tensors[0].detach(), rows, shape)

    with pytest.warns(
        RuntimeWarning, match=r"the rows of gain do not add up .* Is a rule of your own wrong"
    ):
        checked(Net().double(), torch.randint(7, (N, 3)))


def test_one_rule_per_node() -> None:
    with pytest.raises(
        ValueError, match=r"two entries for AddmmBackward0: .*del RULES\['AddmmBackward0'\] takes"
    ):
        rules.rule("AddmmBackward0")(lambda *_: None)


def test_what_is_public_is_there() -> None:
    assert all(hasattr(rules, name) for name in rules.__all__)

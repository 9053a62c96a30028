"""Fused LSTM layers against one backward per row: by rule, whatever is read; GRU and float64 by ordinary nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._graph.rules import RULES
from tests.helpers.checks import assert_rows, joined, trained, truth_of

N, S, I, H = 5, 6, 3, 4
ROUNDING = 4e-6  # of float32, on rows that are sums over time

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A recurrent net from zero, given or learned first states, and one loss a sample of what is read of it."""

    def __init__(self, kind: type[nn.RNNBase], state: str, read: str, **options: Any) -> None:
        super().__init__()
        self.net, self.state, self.read = kind(I, H, **options), state, read
        layers = self.net.num_layers * (1 + self.net.bidirectional)
        first = torch.randn(2, layers, 1, H)
        self.first = nn.Parameter(first) if state == "learned" else first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.net.batch_first else x.transpose(0, 1)
        state = (
            None
            if self.state == "zero"
            else tuple(self.first.expand(-1, -1, N, -1).contiguous().to(x.dtype))
        )
        y, end = self.net(x, state if isinstance(self.net, nn.LSTM) or state is None else state[0])
        y = y if self.net.batch_first else y.transpose(0, 1)
        h, c = end if isinstance(self.net, nn.LSTM) else (end, end)
        found: Tensor = {
            "all": lambda: y.pow(3).mean((1, 2)),
            "last": lambda: y[:, -1].pow(3).mean(1),
            "h": lambda: h.pow(3).mean((0, 2)),
            "c": lambda: c.pow(3).mean((0, 2)),
            "mixed": lambda: c.pow(3).mean((0, 2)) + y.square().mean((1, 2)) + h[0].sum(1),
        }[self.read]()
        return found


@pytest.mark.parametrize("read", ["all", "last", "h", "c", "mixed"])
@pytest.mark.parametrize("state", ["zero", "given", "learned"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True], ids=["forward", "both ways"])
@pytest.mark.parametrize(("bias", "batch_first"), [(True, True), (False, False)])
def test_lstm(
    read: str, state: str, layers: int, both: bool, bias: bool, batch_first: bool
) -> None:
    torch.manual_seed(0)
    options = {
        "num_layers": layers,
        "bidirectional": both,
        "bias": bias,
        "batch_first": batch_first,
    }
    model = Net(nn.LSTM, state, read, **options)
    params, engine = trained(model), mtu.Engine(model)
    for _ in range(3):
        loss = model(torch.randn(N, S, I))
        J = truth_of({"a": loss}, params)
        assert_rows(engine.rows(loss), J, params, ROUNDING)
    for line in engine.explain().lines:
        assert not line.slow and (
            line.name == "first" or "MkldnnRnnLayerBackward0: rule" in line.sites
        )


def test_lstm_without_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "MkldnnRnnLayerBackward0")
    model = Net(nn.LSTM, "zero", "mixed")
    params, engine = trained(model), mtu.Engine(model)
    loss = model(torch.randn(N, S, I))
    J = truth_of({"a": loss}, params)
    assert_rows(engine.rows(loss), J, params, ROUNDING)
    assert all(line.slow for line in engine.explain().lines)


def test_several_tasks_of_which_some_have_no_label() -> None:
    """One task reads all of y, the other the last cell states of half of the samples; one is a single sample's."""
    model = Net(nn.LSTM, "zero", "all", batch_first=True)
    params, engine = trained(model), mtu.Engine(model)
    y, (_, c) = model.net(torch.randn(N, S, I))
    losses = {"y": y.pow(3).mean((1, 2)), "c": c.pow(3).mean((0, 2))}
    there = torch.tensor([True, False, True, False, True])
    J, K = (truth_of({"a": loss}, params) for loss in (losses["y"], losses["c"][there]))
    rows = engine.rows(losses, present={"y": torch.ones_like(there), "c": there})
    assert_rows(rows, joined(J, K), params, ROUNDING)


def test_several_sequences_a_sample() -> None:
    model = Net(nn.LSTM, "zero", "last", bidirectional=True, batch_first=True)
    params, engine = trained(model), mtu.Engine(model)
    for shape in ((N, 3), (1, 3), (3, 1)):
        y = model.net(torch.randn(*shape, S, I).flatten(0, 1))[0][:, -1].unflatten(0, shape)
        loss = y.pow(3).mean((1, 2))
        J = truth_of({"a": loss}, params)
        assert_rows(engine.rows(loss), J, params, ROUNDING)
        assert not any(line.slow for line in engine.explain().lines)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(nn.GRU, torch.float32), (nn.GRU, torch.float64), (nn.LSTM, torch.float64)]
)
def test_what_is_not_fused_is_served_step_by_step(
    kind: type[nn.RNNBase], dtype: torch.dtype
) -> None:
    model = Net(kind, "given", "all", num_layers=2, bidirectional=True).to(dtype)
    params, engine = trained(model), mtu.Engine(model)
    loss = model(torch.randn(N, S, I, dtype=dtype))
    J = truth_of({"a": loss}, params)
    assert_rows(engine.rows(loss), J, params, ROUNDING if dtype == torch.float32 else 1e-12)
    assert not any(line.slow for line in engine.explain().lines)

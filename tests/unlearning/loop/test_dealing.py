"""Kept rows dealt out anew: to one process, from ranks whose batches were of unlike sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._rows.uses import Conv
from mtu_fast.unlearning.loop.dealing import memory_of
from tests.helpers.truth import relative_error

TASKS = ("a", "b")


class Net(nn.Module):
    """A convolution of many numbers, and heads of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 400, 3, padding=1)
        self.heads = nn.ModuleDict({task: nn.Linear(400, 1) for task in TASKS})

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.conv(x)).mean(2)
        return {task: head(h).square().sum(1) for task, head in self.heads.items()}


def filled(seed: int, length: int) -> tuple[Net, mtu.Engine, mtu.Memory]:
    """One net, and a memory of a batch of signals of a length."""
    torch.manual_seed(0)
    net = Net().double()
    engine, memory = mtu.Engine(net), mtu.Memory(every=1, budget=10**6)
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 8, length, generator=drawn, dtype=torch.float64)
    mask = torch.arange(4) < 1
    engine.backward(net.losses(x), mtu.OrthoGrad(0.5), forget=mask, memory=memory)
    return net, engine, memory


def as_a_rank(memory: mtu.Memory) -> dict[str, Any]:
    """The state of a memory, in parts as a rank would have it."""
    state = memory.state_dict()
    return memory_of([state], state, alone=False)


def test_signals_of_unlike_lengths_stay_factors() -> None:
    net, engine, one = filled(1, 5)
    _, _, other = filled(2, 4)
    states = [as_a_rank(one), as_a_rank(other)]
    assert all(len(state["block"]["parts"]) == len(TASKS) for state in states)
    again = mtu.Memory(every=1, budget=10**6)
    again.load_state_dict(memory_of(states, states[0], alone=True), engine.subspace_rows)
    block: Any = again.held.block
    assert [set(map(type, piece.factors.values())) for piece in block.pieces] == [{Conv}] * 4
    assert block.row_nbytes == max(one.held.block.row_nbytes, other.held.block.row_nbytes)
    before = [explicit(memory, net) for memory in (one, other)]
    # task after task, and of each rank after rank
    rows = [J[at] for at in (slice(3), slice(3, 6)) for J in before]
    assert relative_error(explicit(again, net), torch.cat(rows)) <= 1e-12


def explicit(memory: mtu.Memory, net: Net) -> Tensor:
    rows = memory.held.rows
    assert rows is not None
    held = {name: rows.jacobian()[p] for name, p in rows.parameters.items()}
    return torch.cat([held[name].flatten(1) for name, _ in net.named_parameters()], 1)

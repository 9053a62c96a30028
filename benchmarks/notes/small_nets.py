"""Process time of later OrthoGrad steps of nets so small that little but host work is left, over the plain step.

python -m benchmarks.notes.small_nets [--repeats K] [--quick]

    mlp   four layers of width 64, N = 64, half to be forgotten
    gpt   GPT-2-like: 24 pre-norm blocks of width 16, tied head, 4 texts of 8 tokens

Medians over interleaved rounds on one thread, of the process's own time; steps in which a plan is made or
checked are among them, as in training. *Its ops alone* are those that torch ran in one step, recorded and run again
one after the other on the same tensors (what is written in place, again and again), each called from Python. *Walk
and rules* are the time in which the graph is read and compared, and uses are made of output gradients within the
pass, ops included: more than could be gained by doing these in C++. *Launches* are those of `benchmarks.waits`, over
the plain step's. *If collected* is the mean time of a step in which Python's garbage collector runs whenever it
likes, over that of one in which it is off (`mtu_fast._uncollected`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtu_fast as mtu
from benchmarks.replay import Ops
from benchmarks.waits import behind, recorded
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.sweep import _Sweep

Losses = Callable[[], Tensor]
BEFORE = 5  # steps that are not timed
TURNS = 4  # with and without collections


class Block(nn.Module):
    """A pre-norm block of GPT-2: one linear map to queries, keys and values, causal attention, a GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        of_heads = (*x.shape[:2], self.heads, -1)
        q, k, v = (t.view(of_heads).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, 2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        down: Tensor = self.down(F.gelu(self.up(self.second(x))))
        return x + down


class GPT(nn.Module):
    """Logits [N, S, V] of token ids [N, S]; the embedding is the head too."""

    def __init__(self, layers: int, width: int, positions: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, 2) for _ in range(layers)), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        features = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return F.linear(self.blocks(features), self.tokens.weight)


def mlp() -> tuple[nn.Module, Losses, int]:
    """The net, its losses, and N."""
    layers = [m for _ in range(3) for m in (nn.Linear(64, 64), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Linear(64, 10)), torch.randn(64, 64)
    y = torch.randint(10, (64,))
    return model, lambda: F.cross_entropy(model(x), y, reduction="none"), len(x)


def gpt(layers: int = 24) -> tuple[nn.Module, Losses, int]:
    """The same of a language model, whose labels are its tokens, shifted."""
    model, x = GPT(layers, 16, 8, 50), torch.randint(50, (4, 8))

    def losses() -> Tensor:
        logits = model(x)[:, :-1].transpose(1, 2)
        return F.cross_entropy(logits, x[:, 1:], reduction="none").mean(1)

    return model, losses, len(x)


class Ratios(NamedTuple):
    """Over the plain step's: process time of the step, of its ops alone, of walk and rules, and launches.

    collected: mean process time of steps within which Python collects garbage, over those where it is off.
    """

    step: float
    ops: float
    walk: float
    launches: float
    collected: float


@contextmanager
def clocked(spent: list[float]) -> Iterator[None]:
    """Seconds spent on walk and rules are added to `spent[0]`."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **more)
            finally:
                spent[0] += time.process_time() - start

        return call

    with (
        patch.object(Graph, "__init__", timed(Graph.__init__)),
        patch.object(_Sweep, "_reached", timed(_Sweep._reached)),
    ):
        yield


def if_collected(model: nn.Module, losses: Losses, count: int, steps: int) -> float:
    """What a step takes if garbage is collected within it, over what it takes: means of `TURNS` times so many."""
    engine, forget = mtu.Engine(model), torch.arange(count) < count // 2
    collecting: Callable[..., Any] = vars(mtu.Engine)["backward"].__wrapped__

    def seconds(backward: Callable[..., Any], steps: int) -> float:
        start = time.process_time()
        for _ in range(steps):
            model.zero_grad()
            backward(engine, losses(), mtu.OrthoGrad(0.5), forget=forget)
        return time.process_time() - start

    seconds(mtu.Engine.backward, BEFORE)
    took = [0.0, 0.0]
    # in a row, since a collection is due by what steps before it have left
    for _ in range(TURNS):
        for which, backward in enumerate((mtu.Engine.backward, collecting)):
            took[which] += seconds(backward, steps)
    return took[1] / took[0]


def ratios(model: nn.Module, losses: Losses, count: int, repeats: int) -> Ratios:
    """What a step takes."""
    engine, forget = mtu.Engine(model), torch.arange(count) < count // 2

    def ours() -> None:
        model.zero_grad()
        engine.backward(losses(), mtu.OrthoGrad(0.5), forget=forget)

    def plain() -> None:
        model.zero_grad()
        losses().mean().backward()

    for _ in range(BEFORE):
        ours()
    with Ops() as ops:
        ours()
    took: list[list[float]] = [[], [], []]
    walks = []
    for _ in range(repeats):
        for step, of in zip((ours, ops.again, plain), took, strict=True):
            start = time.process_time()
            step()
            of.append(time.process_time() - start)
        spent = [0.0]
        with clocked(spent):
            ours()
        walks.append(spent[0])
    with behind():
        ours()  # what flags need is made
        launches = recorded(ours).launches / recorded(plain).launches
    whole, alone, base = took
    step, ops_alone, walk = (
        median(t / p for t, p in zip(of, base, strict=True)) for of in (whole, alone, walks)
    )
    collected = if_collected(model, losses, count, 2 * repeats)
    return Ratios(step, ops_alone, walk, launches, collected)


def main(argv: Sequence[str] | None = None) -> list[Ratios]:
    """Print a line for each net; return the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=61)
    parser.add_argument("--quick", action="store_true", help="few layers, to see that it runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    nets = {"mlp": mlp(), "gpt": gpt(2 if args.quick else 24)}
    found = []
    for name, net in nets.items():
        found.append(ratios(*net, args.repeats))
        print(
            f"{name}: {found[-1].step:.2f} plain steps, its ops alone {found[-1].ops:.2f}, "
            f"walk and rules {found[-1].walk:.2f}, launches {found[-1].launches:.2f}; if collected "
            f"{found[-1].collected:.2f} times as long",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()

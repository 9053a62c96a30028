"""A rule of your own: make a custom autograd function as fast as a built-in layer.

Without a rule the parameter of `ExpScale` is exact and slow: one local backward per row. The rule says
how all rows of its gradient follow from what the autograd node saved and from the gradient `b` of its
output. A wrong rule is noticed: plans are checked against an ordinary backward.

    python examples/own_rule.py [--tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.rules import RULES, RowMap, Use, rule, summed


class ExpScale(torch.autograd.Function):
    """`out = x · exp(g)`, x `[N, ..., D]` and g `[D]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        """The output; both inputs are saved."""
        ctx.save_for_backward(x, g)
        return x * g.exp()

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and g."""
        x, g = ctx.saved_tensors
        return b * g.exp(), (b * x * g.exp()).flatten(0, -2).sum(0)


def exp_scale(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """Row r of g's gradient is the sum of `b · x · exp(g)` over the positions of row r."""
    x, g = node.saved_tensors
    return summed(b * x * g.exp(), rows, shape)


class Net(nn.Module):
    """A linear layer, the custom scale, a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 1)
        self.gain = nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [N, S, 1]."""
        return self.last(ExpScale.apply(self.first(x), self.gain))


def gram_of(model: nn.Module, x: Tensor) -> Tensor:
    """The Gram matrix of one step's rows; prints how the rows of `gain` were obtained."""
    engine = mtu.Engine(model)
    G = engine.rows(model(x).square().mean((1, 2))).gram()
    (line,) = [line for line in engine.explain().lines if line.name == "gain"]
    print(f"{'SLOW' if line.slow else 'fast'}: {', '.join(line.sites)}")
    return G


def main(argv: Sequence[str] | None = None) -> float:
    """Take the rows without and with the rule; return the largest difference of the Gram matrices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tiny", action="store_true", help="the size of a test")
    width = 4 if parser.parse_args(argv).tiny else parser.parse_args(argv).width

    torch.manual_seed(0)
    model = Net(width).double()
    x = torch.randn(8, 5, width, dtype=torch.float64)
    without = gram_of(model, x)
    # the node's name, and which of its inputs the parameter is; usually written as a decorator
    rule("ExpScaleBackward", slots=(1,))(exp_scale)
    try:
        found = gram_of(model, x)
    finally:
        del RULES["ExpScaleBackward"]  # only so that the example can be run twice in one process
    difference = float((found - without).abs().max())
    print(f"the Gram matrices differ by at most {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()

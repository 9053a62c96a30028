"""A method of your own: from the Gram matrix of the rows to their weights.

`Balanced` descends on the retained tasks and ascends on those to forget, with every mean gradient
scaled to length one, so that no task drowns the others. It sees inner products only, never a gradient.

    python examples/own_method.py [--tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtu_fast as mtu


@dataclass(frozen=True)
class Balanced(mtu.Method):
    """w_r = ±1 / ‖g_r‖: retained gradients downhill, forget gradients uphill, all of length one."""

    least: float = 1e-12  # a length below which a row counts as zero
    per = "task"  # one mean row per (task, role); "sample" for one row per (task, sample)

    def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
        """Weights [..., R] from the Gram matrix [..., R, R]."""
        lengths = G.diagonal(dim1=-2, dim2=-1).sqrt()
        return self.outside(roles) / lengths.clamp(min=self.least)

    def outside(self, roles: mtu.Roles) -> Tensor:
        """Weights [R] of the losses for parameters outside `params` (the heads)."""
        return torch.where(roles.kind == mtu.FORGET, -1.0, 1.0).double()


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Take one step's rows, print each row's length and weight; return the lengths of the weighted rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tiny", action="store_true", help="the size of a test")
    args = parser.parse_args(argv)
    count = 8 if args.tiny else args.samples

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4))
    x, y = torch.randn(count, 10), torch.randint(4, (count,))
    out = model(x)
    losses = {
        "class": F.cross_entropy(out, y, reduction="none"),
        "norm": 100 * out.square().mean(1),
    }
    update = mtu.Engine(model).backward(losses, Balanced(), forget=torch.arange(count) < count // 4)

    assert update.gram is not None
    lengths = update.gram.diagonal().sqrt()
    roles, scaled = update.roles, update.weights * lengths
    for r in range(len(roles)):
        role = "forget" if roles.kind[r] == mtu.FORGET else "retain"
        print(
            f"{roles.tasks[roles.task[r]]:6} {role}  length {lengths[r]:8.3f}"
            f"  weight {update.weights[r]:8.4f}"
        )
    return scaled.tolist()


if __name__ == "__main__":
    main()

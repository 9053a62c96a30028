"""Gradient accumulation: rows of several forwards are joined before one solve.

Projecting each micro-batch on its own does not add up to the projection of the whole batch, because
the inner products between micro-batches are missing. `mtu.cat` joins the rows, cross terms included;
the activations of a micro-batch beyond what its rows need are freed before the next one.

    python examples/gradient_accumulation.py [--micro-batch 8] [--tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtu_fast as mtu


def gradient(model: nn.Module) -> Tensor:
    """All `.grad` as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Compare with the whole batch; return relative distances: joined rows, and one solve per micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="the size of a test")
    args = parser.parse_args(argv)
    if args.tiny:
        args.samples, args.micro_batch = 12, 4

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 128), nn.Tanh(), nn.Linear(128, 10))
    x, y = torch.randn(args.samples, 20), torch.randint(10, (args.samples,))
    forget = torch.rand(args.samples) < 0.25
    engine = mtu.Engine(model)
    method = mtu.OrthoGrad(alpha=0.3)

    def losses(part: slice) -> Tensor:
        return F.cross_entropy(model(x[part]), y[part], reduction="none")

    starts = range(0, args.samples, args.micro_batch)
    parts = [slice(start, start + args.micro_batch) for start in starts]

    # 1. the whole batch at once
    engine.backward(losses(slice(None)), method, forget=forget)
    whole = gradient(model)

    # 2. micro-batches: rows, joined, one solve
    model.zero_grad()
    rows = mtu.cat(*[engine.rows(losses(part), forget=forget[part]) for part in parts])
    rows.backward(method)
    joined = gradient(model)

    # 3. what not to do: one solve per micro-batch
    model.zero_grad()
    for part in parts:
        engine.backward(losses(part), method, forget=forget[part])
    apart = gradient(model) / len(parts)

    found = {"joined": joined, "apart": apart}
    distances = {name: float((g - whole).norm() / whole.norm()) for name, g in found.items()}
    for name, distance in distances.items():
        print(f"{name:7} differs from the whole batch by {distance:.1e} of its length")
    return distances


if __name__ == "__main__":
    main()

"""Cases of `complementary`: all rows of a small cosine matrix projected on the cone of the others, as UPGrad asks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.floor import Cost
from benchmarks.ops.case import KERNEL, REFERENCE, Bench, Case, Run
from mtu_fast._ops.complementary import complementary
from mtu_fast.methods import _programs


def _cosines(rows: int, rank: int, device: str) -> Tensor:
    """Of rows `[rows, 2 · rows]` that conflict, of this rank."""
    J = torch.randn(rows, 2 * rows, dtype=torch.float64, device=device)
    J = J - 0.9 * J.mean(0)
    if rank < rows:
        J = torch.randn(rows, rank, dtype=torch.float64, device=device) @ J[:rank]
    J = J / J.norm(dim=1, keepdim=True)
    return J @ J.T


def _projections(rows: int, rank: int, device: str) -> Bench:
    M = _cosines(rows, rank, device)
    dependent = rank < rows

    def moved(x: Tensor) -> Tensor:
        """M (x + e): what is unique where rows depend on one another."""
        return x @ M + M

    def interior_point() -> Tensor:
        return _programs.complementary(M, M)

    def first(solve: Run) -> Tensor:
        found: Tensor = solve()[0]
        return found

    runs: dict[str, Run] = {
        REFERENCE: partial(first, partial(complementary.reference, M, M, dependent)),
        KERNEL: partial(first, partial(complementary, M, M, dependent)),
        "interior point": interior_point,
    }
    # one solution each on half of the rows
    cost = Cost(16.0 * rows * rows, 8.0 * rows * rows, flops64=rows * (rows / 2) ** 3 / 3)
    return Bench(runs, interior_point, runs[REFERENCE], cost, observe=moved)


SIZES = {  # rows, rank
    "quick": [(5, 5), (6, 3)],
    "cpu": [(8, 8), (32, 32), (8, 4), (32, 16)],
    "cuda": [],
}


def cases(size: str) -> list[Case]:
    """The cases of one size: "quick", "cpu" or "cuda"."""
    return [
        Case(
            "complementary",
            _name(rows, rank),
            ("complementary",),
            partial(_projections, rows, rank),
        )
        for rows, rank in SIZES[size]
    ]


def _name(rows: int, rank: int) -> str:
    return f"{rows} x {rows}" + (f", rank {rank}" if rank < rows else "")

"""Cases of `project`: K rows over many parameter tensors of uneven sizes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.floor import Cost
from benchmarks.ops.case import KERNEL, REFERENCE, Bench, Case, Run
from mtu_fast._ops.project import project_op

TENSORS = 60


def uneven(total: int, parts: int) -> list[int]:
    """Sizes of `parts` tensors, `total` elements in all: a few large ones, many small, as in a network."""
    shares = torch.rand(parts, generator=torch.Generator().manual_seed(0)) ** 4
    sizes = (1 + shares / shares.sum() * (total - parts)).long()
    sizes[-1] += total - sizes.sum()
    return [int(size) for size in sizes]


def _project(k: int, p: int, tensors: int, dtype: torch.dtype, into: bool, device: str) -> Bench:
    sizes = uneven(p, tensors)
    whole = (torch.randn(k, p, device=device) / p**0.5).to(dtype)  # orthonormal up to √(K / P)
    inside = torch.randn(k, device=device) @ whole.float()
    Q = [part.contiguous() for part in whole.split(sizes, 1)]
    # as much in the span as outside
    joined = (torch.randn(p, device=device) / p**0.5 + inside)[None]
    g = [part.contiguous() for part in joined.split(sizes, 1)]

    def each() -> list[Tensor]:
        """Tensor by tensor, as one writes it down; bfloat16 rows are widened, or the result would be bfloat16's."""
        wide = [q.float() for q in Q]
        c = torch.stack([g_l @ q.T for g_l, q in zip(g, wide, strict=True)]).sum(0)
        inside = [c @ q for q in wide]
        return inside if into else [g_l - i for g_l, i in zip(g, inside, strict=True)]

    def once(g: Tensor, Q: Tensor) -> Tensor:
        inside = (g @ Q.T) @ Q
        return inside if into else g - inside

    runs: dict[str, Run] = {
        REFERENCE: partial(project_op.reference, g, Q, into),
        KERNEL: partial(project_op, g, Q, into),
        "tensor by tensor": each,
    }
    # Two passes over the rows, which no cache holds; the vectors twice too, unless only the part
    # inside is wanted.
    read = 2.0 * k * p * whole.element_size() + 4.0 * p * (1 if into else 2)
    cost = Cost(read, 4.0 * p, flops32=4.0 * k * p)
    return Bench(
        runs,
        lambda: once(joined.double(), whole.double()),
        each,
        cost,
        # Its one long float32 sum errs more than the rule allows.
        parts={"one float32 product, joined beforehand": lambda: once(joined, whole.float())},
    )


SIZES = {  # K, P, tensors
    "quick": [(3, 1000, 7)],
    "cpu": [(16, 10_000_000, TENSORS)],
    "cuda": [(16, 10_000_000, TENSORS), (16, 100_000_000, TENSORS)],
}


def cases(size: str) -> list[Case]:
    """The cases of one size: "quick", "cpu" or "cuda"."""
    variants = [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
    return [
        Case(
            "project",
            f"{k} x {p} in {n}, {str(dtype).removeprefix('torch.')}{', into' if into else ''}",
            ("project",),
            partial(_project, k, p, n, dtype, into),
        )
        for k, p, n in SIZES[size]
        for dtype, into in variants
    ]

"""Cases of `gram_schmidt` (batched, small), `transform` and `orthonormalize` (tall rows)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.floor import Cost
from benchmarks.ops.case import KERNEL, REFERENCE, Bench, Case, Run
from mtu_fast._ops import gram_schmidt as op
from mtu_fast._ops.gram import row_gram

# condition of the rows: where rounding is no lottery, and where a float32 QR shows it
SOLVED, TALL_ROWS = 4.0, 1e2


def conditioned(*shape: int, condition: float, device: str) -> Tensor:
    """Rows `[..., K, P]` float64: random, of lengths from 1 down to 1 / `condition`, mixed with one another."""
    k = shape[-2]
    lengths = torch.logspace(0, -float(np.log10(condition)), k, dtype=torch.float64, device=device)
    mixing = torch.linalg.qr(torch.randn(*shape[:-2], k, k, dtype=torch.float64, device=device)).Q
    rows = torch.randn(shape, dtype=torch.float64, device=device) / shape[-1] ** 0.5
    return mixing * lengths @ rows


# ---- batched and small ---------------------------------------------------------------------------


def _refined(G: Tensor, rhs: Tensor) -> Tensor:
    """The solution, residuals taken in extended precision."""
    x = torch.linalg.solve(G, rhs)
    wide, target = (t.cpu().numpy().astype(np.longdouble) for t in (G, rhs))
    for _ in range(2):
        residual = target - (wide @ x.cpu().numpy().astype(np.longdouble)[..., None])[..., 0]
        x = x + torch.linalg.solve(G, torch.from_numpy(residual.astype(np.float64)).to(G.device))
    return x


def _batched(batch: int, r: int, device: str) -> Bench:
    J = conditioned(batch, r, 2 * r, condition=SOLVED, device=device)
    G, rhs = J @ J.mT, torch.randn(batch, r, dtype=torch.float64, device=device)
    active = torch.ones(r, dtype=torch.bool, device=device)
    arguments = (G, rhs, active, op.TOLERANCE[torch.float64])
    same_size = J[..., :r].contiguous()

    def cholesky() -> Tensor:
        return torch.cholesky_solve(rhs[..., None], torch.linalg.cholesky(G)).squeeze(-1)

    runs: dict[str, Run] = {
        REFERENCE: lambda: op.gram_schmidt.reference(*arguments)[0],
        KERNEL: lambda: op.gram_schmidt(*arguments)[0],
        "cholesky": cholesky,
    }
    cost = Cost(
        8.0 * batch * (r * r / 2 + r), 8.0 * batch * r, flops64=batch * (r**3 / 3 + 2.0 * r * r)
    )
    parts: dict[str, Run] = {"qr of square rows, no solve": lambda: torch.linalg.qr(same_size)}
    return Bench(runs, partial(_refined, G, rhs), cholesky, cost, parts)


# ---- tall ----------------------------------------------------------------------------------------


def _transform(k: int, p: int, device: str) -> Bench:
    rows = [torch.randn(k, p, device=device)]
    T = torch.randn(k, k, dtype=torch.float64, device=device).tril()
    runs: dict[str, Run] = {
        REFERENCE: partial(op.transform.reference, rows, T),
        KERNEL: partial(op.transform, rows, T),
        "untiled": lambda: (T @ rows[0].double()).float(),
        "one float32 product": lambda: T.float() @ rows[0],
    }
    cost = Cost(4.0 * k * p, 4.0 * k * p, flops64=float(k) * (k + 1) * p)
    return Bench(runs, lambda: T @ rows[0].double(), runs["one float32 product"], cost)


def _composed(rows: Tensor, tol: float) -> Tensor:
    """`orthonormalize` of the ops' references."""
    for _ in range(2):
        T, _ = op.basis.reference(row_gram.reference([rows]), tol)
        rows = op.transform.reference([rows], T)[0]
    return rows


def _tall(k: int, p: int, device: str) -> Bench:
    rows = conditioned(k, p, condition=TALL_ROWS, device=device).float()
    probe = torch.randn(p, dtype=torch.float64, device=device) + rows.sum(0).double() * p**0.5

    def onto_the_span(Q: Tensor) -> Tensor:
        """Qᵀ Q v: the order of the pivots is left to the implementation, the span and orthonormality are not."""
        wide = Q.double()
        return (wide.T @ (wide @ probe)).to(Q.dtype)

    def qr(dtype: torch.dtype) -> Tensor:
        return torch.linalg.qr(rows.to(dtype).T).Q.T

    runs: dict[str, Run] = {
        REFERENCE: partial(_composed, rows, op.TOLERANCE[torch.float32]),
        KERNEL: lambda: op.orthonormalize(rows)[0],
        "qr": partial(qr, torch.float32),
    }
    # Two rounds: a Gram, then rows times a triangle.
    cost = Cost(16.0 * k * p, 8.0 * k * p, flops64=4.0 * k * (k + 1) * p)
    return Bench(runs, partial(qr, torch.float64), runs["qr"], cost, observe=onto_the_span)


# ---- the table -----------------------------------------------------------------------------------

BATCHED = {  # problems, rows
    "quick": [(8, 6)],
    "cpu": [(1024, 32), (64, 64), (16, 128), (1, 512)],
    "cuda": [(1024, 32), (4096, 32), (64, 64), (16, 128), (256, 128), (1, 512)],
}
TALL = {"quick": [(3, 1000)], "cpu": [(32, 1 << 20)], "cuda": [(32, 25_000_000)]}


def cases(size: str) -> list[Case]:
    """The cases of one size: "quick", "cpu" or "cuda"."""
    steps = ("row_gram", "basis", "transform")
    return [
        *(
            Case("gram_schmidt", f"{b} x {r} x {r}", ("gram_schmidt",), partial(_batched, b, r))
            for b, r in BATCHED[size]
        ),
        *(
            Case("transform", f"{k} x {p}", ("transform",), partial(_transform, k, p))
            for k, p in TALL[size]
        ),
        *(Case("orthonormalize", f"{k} x {p}", steps, partial(_tall, k, p)) for k, p in TALL[size]),
    ]

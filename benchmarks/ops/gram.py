"""Cases of `row_gram`, `rank_one_gram`, the Grams of positions by either route, and `gather_gram`.

Products are what the kernels plan for the device (float64 on the CPU and on GPUs where that is
fast, else float32), and so is what they are measured against. Floors count the upper triangle only,
products that tasks share once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from itertools import combinations_with_replacement
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.floor import Cost
from benchmarks.ops.case import KERNEL, REFERENCE, Bench, Case, Run
from mtu_fast._ops import _library, explicit, gram
from mtu_fast._ops._convolution import Geometry, conv_weight_gradient, plain_rows

HIGHEST = "highest"
CHUNK = 1 << 11  # columns of a truth's tile
STRIPS = 8  # of the upper triangle, for the vendor's products


def products(device: str) -> torch.dtype:
    """The precision of the ghost Grams' products of float32 on this device, "highest"."""
    return _planned(device, "ghost_plan", HIGHEST)


def row_products(device: str, rows: int) -> torch.dtype:
    """The precision of the products of explicit float32 rows on this device."""
    return _planned(device, "row_plan", rows)


def _planned(device: str, chooser: str, *arguments: object) -> torch.dtype:
    """What Triton's launcher chooses; float64 where plain torch or the CPU's kernels serve."""
    if device.startswith("cuda") and not _library.why_no_triton():
        plans, machine = (import_module(f"mtu_fast.kernels.{name}") for name in ("plans", "device"))
        plan = getattr(plans, chooser)(torch.float32, *arguments, machine.arch())
        if plan is not None:
            return plan.sums
    return torch.float64


def untiled(left: Sequence[Tensor], right: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The ghost Gram as one writes it down: `(A Aᵀ) ∘ (B_t B_uᵀ)` whole, A `[N, S, ·]` the same for all tasks."""
    (n, s), tasks = left[0].shape[:2], len(right)
    a, b = left[0].to(dtype).flatten(0, 1), [t.to(dtype).flatten(0, 1) for t in right]
    shared = a @ a.T
    out = a.new_zeros(tasks, n, tasks, n)
    for t, u in combinations_with_replacement(range(tasks), 2):
        out[t, :, u] = ((b[t] @ b[u].T) * shared).view(n, s, n, s).sum((1, 3))
        if t != u:
            out[u, :, t] = out[t, :, u].T
    return out.view(tasks * n, tasks * n)


def strip_products(sides: Sequence[Tensor]) -> None:
    """X Xᵀ of each side `[n, ·]` by vendor products on strips of the upper triangle; nothing is kept."""
    for side in sides:
        step = -(-len(side) // STRIPS)
        for lo in range(0, len(side), step):
            side[lo : lo + step] @ side[lo:].T


def _upper(n: int, k: int) -> float:
    """FLOPs of the upper triangle of X Xᵀ, X `[n, k]`."""
    return float(n) * (n + 1) * k


def _cost(dtype: torch.dtype, flops: float, read: float, rows: int, flops32: float = 0.0) -> Cost:
    """Products in `dtype` of what is read, into G; `flops32` besides, whatever the dtype."""
    wide = flops if dtype == torch.float64 else 0.0
    return Cost(read, 8.0 * rows**2, flops32=flops32 + flops - wide, flops64=wide)


def _summed_pairwise(rows: Tensor) -> Tensor:
    """J Jᵀ of float32 rows, closer than one float64 product, whose sum over a million columns alone errs by 1e-13."""
    tiles = [tile.double() @ tile.double().T for tile in rows.split(CHUNK, 1)]
    return torch.stack(tiles).sum(0)  # pairwise


# ---- explicit rows -------------------------------------------------------------------------------


def _rows(r: int, p: int, device: str) -> Bench:
    rows = [torch.randn(r, p, device=device)]

    def whole() -> Tensor:
        wide = rows[0].double()
        return wide @ wide.T

    runs: dict[str, Run] = {
        REFERENCE: partial(gram.row_gram.reference, rows),
        KERNEL: partial(gram.row_gram, rows),
        "untiled": whole,
    }
    parts: dict[str, Run] = {"one float32 product": lambda: rows[0] @ rows[0].T}
    dtype = row_products(device, r)
    plain = runs[REFERENCE] if dtype == torch.float64 else parts["one float32 product"]
    return Bench(
        runs,
        partial(_summed_pairwise, rows[0]),
        plain,
        _cost(dtype, _upper(r, p), 4.0 * r * p, r),
        parts,
    )


# ---- rows of rank one ----------------------------------------------------------------------------


def _rank_one(n: int, width: int, layers: int, tasks: int, device: str) -> Bench:
    shape = (n, width)
    right = [x for _ in range(layers) for x in [torch.randn(shape, device=device)] * tasks]
    left = [torch.randn(shape, device=device) for _ in right]

    def whole(dtype: torch.dtype) -> Tensor:
        sides = zip(
            *([torch.cat(t).to(dtype) for t in _parted(side, tasks)] for side in (left, right)),
            strict=True,
        )
        return torch.stack([(a @ a.T) * (b @ b.T) for a, b in sides]).sum(0)

    dtype, rows = row_products(device, tasks * n), tasks * n
    runs: dict[str, Run] = {
        REFERENCE: partial(gram.rank_one_gram.reference, left, right, layers),
        KERNEL: partial(gram.rank_one_gram, left, right, layers),
        "untiled": partial(whole, torch.float64),
    }
    plain = runs[REFERENCE] if dtype == torch.float64 else partial(whole, torch.float32)
    flops = layers * (_upper(rows, width) + _upper(n, width))
    return Bench(
        runs, runs["untiled"], plain, _cost(dtype, flops, 4.0 * layers * (rows + n) * width, rows)
    )


def _parted(blocks: list[Tensor], size: int) -> list[list[Tensor]]:
    return [blocks[i : i + size] for i in range(0, len(blocks), size)]


# ---- ghost routes --------------------------------------------------------------------------------


def _outer(n: int, s: int, a: int, b: int, tasks: int, device: str) -> Bench:
    left = [torch.randn(n, s, a, device=device)] * tasks
    right = [torch.randn(n, s, b, device=device) for _ in range(tasks)]
    dtype, rows = products(device), tasks * n
    sides = [left[0].to(dtype).flatten(0, 1), torch.cat(right).to(dtype).flatten(0, 1)]
    runs: dict[str, Run] = {
        REFERENCE: partial(gram.outer_ghost.reference, left, right, HIGHEST),
        KERNEL: partial(gram.outer_ghost, left, right, HIGHEST),
        "untiled": partial(untiled, left, right, dtype),
    }
    flops = _upper(n * s, a) + _upper(rows * s, b)
    cost = _cost(dtype, flops, 4.0 * n * s * (a + tasks * b), rows)
    return Bench(
        runs,
        partial(untiled, left, right, torch.float64),
        runs[REFERENCE] if dtype == torch.float64 else runs["untiled"],
        cost,
        {"vendor products": partial(strip_products, sides)},
    )


def _patches(x: Tensor) -> Tensor:
    """3×3 patches of x `[N, 1, C, H, W]`, padding 1: `[N, H·W, 9·C]`."""
    return functional.unfold(x[:, 0], 3, padding=1).mT


def _conv(n: int, channels: int, side: int, tasks: int, device: str) -> Bench:
    shape = (n, 1, channels, side, side)
    x = [torch.randn(shape, device=device)] * tasks
    b = [torch.randn(shape, device=device) for _ in range(tasks)]
    walk = ((3, 3), (1, 1), (1, 1), (1, 1), HIGHEST)
    dtype, rows, pixels = products(device), tasks * n, n * side**2
    gradients = [t[:, 0].flatten(2).mT for t in b]
    sides = [
        x[0][:, 0].flatten(2).mT.to(dtype).flatten(0, 1),
        torch.cat(gradients).to(dtype).flatten(0, 1),
    ]

    def unfolded(dtype: torch.dtype) -> Tensor:
        return untiled([_patches(x[0].to(dtype))] * tasks, gradients, dtype)

    runs: dict[str, Run] = {
        REFERENCE: partial(gram.conv_ghost.reference, x, b, *walk),
        KERNEL: partial(gram.conv_ghost, x, b, *walk),
        "unfolded": partial(unfolded, dtype),
    }
    flops = _upper(pixels, channels) + _upper(tasks * pixels, channels)
    return Bench(
        runs,
        partial(unfolded, torch.float64),
        runs[REFERENCE] if dtype == torch.float64 else runs["unfolded"],
        _cost(dtype, flops, 4.0 * pixels * channels * (1 + tasks), rows),
        {"vendor products": partial(strip_products, sides)},
    )


def _gather(n: int, s: int, vocabulary: int, d: int, device: str) -> Bench:
    index = [torch.randint(vocabulary, (n, s), device=device)]
    values = [torch.randn(n, s, d, device=device)]

    def matched(dtype: torch.dtype) -> Tensor:
        where, what = index[0].flatten(), values[0].to(dtype).flatten(0, 1)
        return (
            ((what @ what.T) * (where[:, None] == where))
            .view(n, s, n, s)
            .sum((1, 3), dtype=torch.float64)
        )

    runs: dict[str, Run] = {
        REFERENCE: partial(gram.gather_gram.reference, index, values),
        KERNEL: partial(gram.gather_gram, index, values),
        "matched": partial(matched, torch.float64),
    }
    # What has to be multiplied: rows restricted to the entries that occur in both of a pair; the
    # diagonal at least.
    cost = _cost(products(device), 2.0 * n * s * d, 4.0 * n * s * d + 8.0 * n * s, n)
    return Bench(
        runs, runs["matched"], lambda: gram.gather_gram.reference(index, values).float(), cost
    )


# ---- direct routes -------------------------------------------------------------------------------


def _outer_direct(n: int, s: int, a: int, b: int, device: str) -> Bench:
    left, right = [torch.randn(n, s, a, device=device)], [torch.randn(n, s, b, device=device)]

    def whole(dtype: torch.dtype) -> Tensor:
        rows = explicit.outer_rows(left[0].to(dtype), right[0].to(dtype)).flatten(1)
        return gram.row_gram.reference([rows])

    runs: dict[str, Run] = {
        REFERENCE: partial(whole, torch.float32),
        KERNEL: partial(gram.outer_direct, left, right, HIGHEST),
    }
    making = 2.0 * n * s * a * b
    cost = _cost(
        row_products(device, n), _upper(n, a * b), 4.0 * n * s * (a + b), n, flops32=making
    )
    parts: dict[str, Run] = {"vendor products": partial(explicit.outer_rows, left[0], right[0])}
    return Bench(
        runs, partial(whole, torch.float64), lambda: whole(torch.float32).float(), cost, parts
    )


def _conv_direct(n: int, channels: int, side: int, dtype: torch.dtype, device: str) -> Bench:
    shape = (n, 1, channels, side, side)
    x, b = [[torch.randn(shape, device=device).to(dtype)] for _ in range(2)]
    geometry = Geometry((channels, channels, 3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 1)

    def whole(dtype: torch.dtype) -> Tensor:
        rows = plain_rows(x[0].to(dtype), b[0].to(dtype), geometry).flatten(1)
        return gram.row_gram.reference([rows])

    def vendor() -> None:
        for x_r, b_r in zip(x[0], b[0], strict=True):
            conv_weight_gradient(x_r, b_r, geometry)

    walk = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, HIGHEST)
    runs: dict[str, Run] = {
        REFERENCE: partial(whole, torch.float32),
        KERNEL: partial(gram.conv_direct, x, b, *walk),
    }
    p, positions = prod(geometry.weight), n * side**2
    # of half precision on tensor cores: next to nothing
    making = 2.0 * positions * p if dtype == torch.float32 else 0.0
    read = 2.0 * dtype.itemsize * positions * channels
    cost = _cost(row_products(device, n), _upper(n, p), read, n, flops32=making)
    parts: dict[str, Run] = {
        "vendor convolutions": vendor,
        "one batch weight gradient": partial(
            conv_weight_gradient, x[0][:, 0], b[0][:, 0], geometry
        ),
    }
    return Bench(
        runs, partial(whole, torch.float64), lambda: whole(torch.float32).float(), cost, parts
    )


# ---- the table -----------------------------------------------------------------------------------

ROWS = {
    "quick": [(3, 1000)],
    "cpu": [(16, 1 << 20), (48, 1 << 20), (16, 1 << 23)],
    "cuda": [(16, 1 << 24), (48, 1 << 24), (64, 1 << 25)],
}
RANK_ONE = {  # N, features in and out, layers, tasks
    "quick": [(3, 8, 2, 2)],
    "cpu": [(64, 1024, 3, 1), (64, 1024, 3, 3), (256, 1024, 3, 1)],
    "cuda": [(256, 4096, 3, 1), (256, 4096, 3, 3)],
}
OUTER = {  # N, S, features in and out, tasks
    "quick": [(3, 4, 8, 16, 2)],
    "cpu": [
        (16, 64, 256, 256, 1), (16, 128, 256, 256, 1), (16, 256, 256, 256, 1), (16, 64, 256, 256, 3),
        (16, 128, 256, 256, 3), (16, 64, 1024, 1024, 1), (16, 128, 1024, 1024, 1), (16, 256, 1024, 1024, 1),
        (16, 64, 1024, 1024, 3),
    ],
    "cuda": [
        (32, 64, 1024, 1024, 1), (32, 128, 1024, 1024, 1), (64, 128, 1024, 1024, 1), (32, 64, 1024, 1024, 3),
        (32, 128, 1024, 1024, 3), (32, 128, 4096, 4096, 1),
    ],
}  # fmt: skip
CONV = {  # N, channels, height and width, tasks
    "quick": [(3, 8, 4, 2)],
    "cpu": [(16, 512, 8, 1), (16, 512, 4, 1), (16, 512, 8, 3), (16, 512, 4, 3)],
    "cuda": [(64, 512, 8, 1), (128, 512, 4, 1), (64, 512, 8, 3), (128, 512, 4, 3)],
}
GATHER = {  # N, S, vocabulary, features
    "quick": [(3, 8, 20, 8)],
    "cpu": [(16, 64, 1000, 256), (16, 256, 32_000, 256)],
    "cuda": [(64, 128, 1000, 1024), (32, 256, 32_000, 1024)],
}
# on a GPU the sides' Grams are the kernel's, their product plain torch's
SIDES = ("rank_one_gram", "row_gram")
# on a GPU the rows are the vendor's, their Gram is the kernel's
DIRECT = ("outer_direct", "row_gram")
OUTER_DIRECT = {  # N, S, features in and out
    "quick": [(3, 300, 8, 16)],
    "cpu": [(16, 64, 256, 1024), (48, 64, 256, 1024), (16, 512, 256, 256), (16, 1024, 256, 1024)],
    "cuda": [(64, 1024, 1024, 1024), (32, 2048, 1024, 4096)],
}
CONV_DIRECT = {  # N, channels, height and width
    "quick": [(3, 8, 16)],
    "cpu": [(16, 64, 64), (16, 128, 32), (16, 256, 16), (16, 512, 8)],
    "cuda": [(128, 64, 64), (128, 128, 32), (128, 256, 16), (64, 512, 8)],
}
HALVES = {"quick": [(3, 8, 16)], "cpu": [], "cuda": [(128, 64, 64), (128, 256, 16)]}


def cases(size: str) -> list[Case]:
    """The cases of one size: "quick", "cpu" or "cuda"."""
    tasks = ["", " one task", " two tasks", " three tasks"]
    return [
        *(
            Case("row_gram", f"{r} x {p}", ("row_gram",), partial(_rows, r, p))
            for r, p in ROWS[size]
        ),
        *(
            Case(
                "rank_one_gram",
                f"{n} x {d}, {j} layers,{tasks[t]}",
                SIDES,
                partial(_rank_one, n, d, j, t),
            )
            for n, d, j, t in RANK_ONE[size]
        ),
        *(
            Case(
                "outer_ghost",
                f"{n} x {s}, {a} x {b},{tasks[t]}",
                ("outer_ghost",),
                partial(_outer, n, s, a, b, t),
            )
            for n, s, a, b, t in OUTER[size]
        ),
        *(
            Case(
                "conv_ghost",
                f"{n} x {c} x {h}²,{tasks[t]}",
                ("conv_ghost",),
                partial(_conv, n, c, h, t),
            )
            for n, c, h, t in CONV[size]
        ),
        *(
            Case(
                "gather_gram",
                f"{n} x {s}, {v} x {d}",
                ("gather_gram",),
                partial(_gather, n, s, v, d),
            )
            for n, s, v, d in GATHER[size]
        ),
        *(
            Case(
                "outer_direct", f"{n} x {s}, {a} x {b}", DIRECT, partial(_outer_direct, n, s, a, b)
            )
            for n, s, a, b in OUTER_DIRECT[size]
        ),
        *(
            Case(
                "conv_direct",
                f"{n} x {c} x {h}²{name}",
                ("conv_direct", "unordered_rows", "row_gram"),
                partial(_conv_direct, n, c, h, dtype),
            )
            for sizes, dtype, name in (
                (CONV_DIRECT, torch.float32, ""),
                (HALVES, torch.bfloat16, ", bfloat16"),
            )
            for n, c, h in sizes[size]
        ),
    ]

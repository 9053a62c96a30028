"""`G = J Jᵀ` from what is known of the rows: explicit rows, outer products, convolutions, table look-ups.

One function per kind of use. Each takes the blocks of one parameter (one block per task and
forward), returns the float64 Gram of all their rows, and picks the cheaper of two routes:

* *direct*: the rows themselves, a tile of the parameter at a time, `Σ_tiles X Xᵀ` (the ops
  `outer_direct` and `conv_direct`; `row_gram` of rows that are there);
* *ghost*: positions instead of parameters, `G[r, q] = Σ_{s,u} (left_rs · left_qu) (right_rs ·
  right_qu)`, products of a side that blocks share (the activations under several tasks) made once
  (the ops `outer_ghost` and `conv_ghost`).

Where every row is one outer product, one position, there is no choice: `rank_one_gram`, for many
parameters at a time. A table that is looked up and multiplied with, as an embedding that is the
head too, has rows of both kinds, which meet in `outer_gather`.

Products of rows are summed in float64 everywhere: a float32 Gram loses half of the digits that a
solve needs (see CONTRIBUTING.md). A row itself is rounded as any gradient of its dtype.

`precision` says how exact the products under these sums must be, in torch's words: "highest",
"high" (float32 products may be TF32×3) or "medium" (TF32, or bfloat16 where the input is). It is a
permission: a kernel may be more exact, and plain torch is always at its highest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from math import inf, prod
from typing import NamedTuple

import torch
from torch import Tensor

from mtu_fast._ops._arguments import (
    check_blocks,
    check_devices,
    check_explicit,
    check_images,
    check_lookups,
    check_sides,
)
from mtu_fast._ops._blocks import (
    WIDE,
    distinct,
    families,
    memory,
    offsets,
    pairs,
    place,
    square,
)
from mtu_fast._ops._convolution import Geometry, plain_rows
from mtu_fast._ops._library import define
from mtu_fast._ops._pixels import Walk, by_pixel, patch_gram
from mtu_fast._ops._prices import OF_KERNELS, PLAIN_TORCH, Prices
from mtu_fast._ops.explicit import conv_rows, gather_rows, outer_rows

# elements of a float64 tile that is read again at once: 2 MiB, what a core's cache holds
TILE = 1 << 18
PANELS = (12, 128)  # columns, and bytes, of the panels in csrc/cpu/direct.cpp
TILE_PANELS = (8, 170)  # wide panels of a tile there: at least, and divided by the rows
# elements of explicit rows formed at a time: 16 MiB, below where allocators hand out fresh pages
BUFFER = 1 << 22


class RouteCosts(NamedTuple):
    """What one parameter's Gram and a combination of its rows cost, in the unit of `Prices`.

    ghost, direct: a Gram by each route. combine: a combination from factors, one weight gradient.
    kept: both at once, from rows that are formed and kept.
    """

    ghost: float
    direct: float
    combine: float
    kept: float

    @property
    def route(self) -> str:
        """`"ghost"` or `"direct"`, whichever Gram costs less."""
        return "ghost" if self.ghost < self.direct else "direct"

    @property
    def rows_pay(self) -> bool:
        """Whether a Gram and a combination cost less where the rows are formed for the one and kept for the other."""
        return self.kept < min(self.ghost, self.direct) + self.combine


def prices(device: torch.device) -> Prices:
    """The prices of what serves `device`: kernels, or plain torch."""
    if outer_ghost.why_no_kernel(device.type.upper()):
        return PLAIN_TORCH
    return OF_KERNELS[device.type]


def inexact(device: torch.device, dtype: torch.dtype, precision: str) -> bool:
    """Whether Grams of `dtype` on `device` sum products in less than float64: what the kernels' plans say."""
    if device.type != "cuda" or outer_ghost.why_no_kernel("CUDA"):
        # plain torch and the CPU's kernels multiply rows, and add the products, in float64
        return False
    plans, (major, minor) = (
        import_module("mtu_fast.kernels.plans"),
        torch.cuda.get_device_capability(device),
    )
    arch = 10 * major + minor
    made = (plans.row_plan(dtype, 1, arch), plans.ghost_plan(dtype, precision, arch))
    return any(plan is not None and plan.sums != WIDE for plan in made)


# ---- explicit rows -------------------------------------------------------------------------------


def _check_rows(rows: Sequence[Tensor], known: int = 0) -> None:
    check_explicit(rows)
    total = sum(t.shape[0] for t in rows)
    if not 0 <= known <= total:
        raise ValueError(f"known: found {known}, expected a number of rows, from 0 to {total}.")


@define("row_gram(Tensor[] rows, int known=0) -> Tensor", check=_check_rows)
def row_gram(rows: Sequence[Tensor], known: int = 0) -> Tensor:
    """`G = J Jᵀ` of explicit rows, without joining them: each `[R_i, P]` -> float64 `[R, R]`, R = Σ R_i.

    Products of the last `known` rows with one another are left out: zeros.
    """
    total = sum(t.shape[0] for t in rows)
    fresh = total - known
    gram = rows[0].new_zeros(total, total, dtype=WIDE)
    step = max(1, TILE // max(total, 1))
    for start in range(0, rows[0].shape[1], step):
        wide = [t[:, start : start + step].to(WIDE) for t in rows]
        tile = wide[0] if len(wide) == 1 else torch.cat(wide)
        gram[:fresh].addmm_(tile[:fresh], tile.T)
    gram[fresh:, :fresh] = gram[:fresh, fresh:].T
    return gram


@row_gram.fake
def _(rows: Sequence[Tensor], known: int = 0) -> Tensor:
    return square(rows)


row_gram.triton("gram")


# ---- outer products ------------------------------------------------------------------------------


def _check_rank_one(left: Sequence[Tensor], right: Sequence[Tensor], parameters: int) -> None:
    check_blocks("highest", left=left, right=right)
    if parameters < 1 or len(left) != len(right) or not left or len(left) % parameters:
        raise ValueError(
            f"found {len(left)} and {len(right)} blocks, expected as many on both sides and for each of the "
            f"{parameters} parameters, one at least."
        )
    blocks = len(left) // parameters
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        # the block of the first parameter, and the first one of this parameter
        first = i % blocks, i - i % blocks
        expected = [
            (*left[first[0]].shape[:1], *side[first[1]].shape[1:]) for side in (left, right)
        ]
        if a.dim() != 2 or b.dim() != 2 or [tuple(a.shape), tuple(b.shape)] != expected:
            raise ValueError(
                f"the sides of block {i} have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected {expected[0]} and "
                f"{expected[1]}: [R_i, width], the rows of the first parameter and one width in all blocks of a side."
            )


@define(
    "rank_one_gram(Tensor[] left, Tensor[] right, int parameters) -> Tensor", check=_check_rank_one
)
def rank_one_gram(left: Sequence[Tensor], right: Sequence[Tensor], parameters: int) -> Tensor:
    """`G = Σ_j (L_j L_jᵀ) ∘ (R_j R_jᵀ)`: rows that are one outer product, `left ⊗ right`, in several parameters j.

    Blocks left `[R_i, A_j]` and right `[R_i, B_j]`, those of a parameter together -> float64 `[R,
    R]`.
    """
    blocks = len(left) // parameters
    sides = [side[j : j + blocks] for j in range(0, len(left), blocks) for side in (left, right)]
    keys = [tuple(map(memory, side)) for side in sides]
    last = {key: i for i, key in enumerate(keys)}
    grams: dict[tuple[tuple[object, ...], ...], Tensor] = {}
    gram = left[0].new_zeros(*2 * (sum(t.shape[0] for t in left[:blocks]),), dtype=WIDE)
    for i, (key, side) in enumerate(zip(keys, sides, strict=True)):
        if key not in grams:
            grams[key] = _side_gram(side)
        if i % 2:
            gram.addcmul_(grams[keys[i - 1]], grams[key])
            grams = {key: of_side for key, of_side in grams.items() if last[key] > i}
    return gram


def _side_gram(blocks: Sequence[Tensor]) -> Tensor:
    """`row_gram`, rows of blocks that are one and the same tensor multiplied once."""
    groups = families(blocks)
    if len(groups) == len(blocks):
        return row_gram(blocks)
    starts = dict(
        zip((f[0] for f in groups), offsets([blocks[f[0]] for f in groups]), strict=False)
    )
    first = {i: starts[family[0]] for family in groups for i in family}
    at = torch.cat([torch.arange(len(t), device=t.device) + first[i] for i, t in enumerate(blocks)])
    return row_gram([blocks[f[0]] for f in groups])[at[:, None], at]


@rank_one_gram.fake
def _(left: Sequence[Tensor], right: Sequence[Tensor], parameters: int) -> Tensor:
    return square(left[: len(left) // parameters])


def outer_gram(
    left: Sequence[Tensor], right: Sequence[Tensor], precision: str = "highest"
) -> Tensor:
    """`G = J Jᵀ` of rows `Σ_s left ⊗ right`: blocks left `[R_i, S_i, A]`, right `[R_i, S_i, B]` -> float64 `[R, R]`."""
    check_sides(left, right, precision)
    route = outer_route(left, right)
    if route == "rank one":
        return rank_one_gram([t[:, 0] for t in left], [t[:, 0] for t in right], 1)
    if route == "ghost":
        return outer_ghost(left, right, precision)
    return outer_direct(left, right, precision)


def outer_route(left: Sequence[Tensor], right: Sequence[Tensor]) -> str:
    """`"rank one"` (rows of one position), or `"ghost"` or `"direct"`, whichever costs least for these blocks."""
    return "rank one" if all(t.shape[1] == 1 for t in left) else outer_cost(left, right).route


def outer_cost(left: Sequence[Tensor], right: Sequence[Tensor]) -> RouteCosts:
    """What the Gram of these blocks, of more than one position, and a combination cost by each route."""
    r, a, b = sum(t.shape[0] for t in left), left[0].shape[2], right[0].shape[2]
    price = prices(left[0].device)
    positions = sum(t.shape[0] * t.shape[1] for t in left)
    apart = [sum(t.shape[0] * t.shape[1] for t in distinct(side)) for side in (left, right)]
    ghost = price.reduce * positions**2
    ghost += sum(
        (price.product * n + price.widen) * n * width
        for n, width in zip(apart, (a, b), strict=True)
    )
    formed = _Forming(r, positions, (a, apart[0]), (b, apart[1]), left[0].dtype == WIDE)
    return _route_costs(price, ghost, formed, fused=True, calls=0.0)


class _Forming(NamedTuple):
    """What it takes to form rows: positions of all of them; columns and distinct positions of either side."""

    rows: int
    positions: int
    left: tuple[int, int]
    right: tuple[int, int]
    double: bool
    patches: bool = False

    @property
    def columns(self) -> int:
        return self.left[0] * self.right[0]

    @property
    def work(self) -> float:
        """Multiply-adds, those of float64 twice."""
        return float(self.positions * self.columns) * (2 if self.double else 1)

    def in_cache(self, price: Prices) -> float:
        """By panels of columns, broken ones as whole ones; the taller side is laid out for every tile of the other."""
        (tall, far), (wide, near) = self.left, self.right
        if tall < wide and not self.patches:  # patches are never laid out whole
            (tall, far), (wide, near) = self.right, self.left
        height, lanes = PANELS[0], PANELS[1] // (8 if self.double else 4)
        down, across = -(-tall // height), -(-wide // lanes)
        whole = down * height * across * lanes / self.columns
        tiles = -(-across // max(TILE_PANELS[0], TILE_PANELS[1] // self.rows))
        laid_out = price.pack * (near * wide + far * tall * tiles)
        each = (price.row_product * self.rows + (price.tile or 0.0)) * self.rows * self.columns
        return whole * (self.work + each) + laid_out


def _route_costs(
    price: Prices, ghost: float, form: _Forming, *, fused: bool, calls: float
) -> RouteCosts:
    """The cost where a Gram from positions costs `ghost`; fused: rows are formed in cache; calls: beside the work."""
    if not form.columns or not form.rows:
        return RouteCosts(ghost, 0.0, 0.0, 0.0)
    products, written = (
        price.row_product * form.rows**2 * form.columns,
        price.row * form.rows * form.columns,
    )
    formed = form.work + calls + written + products
    direct = form.in_cache(price) if fused and price.tile is not None else formed
    return RouteCosts(ghost, direct, form.work, formed + written)


@define("outer_direct(Tensor[] left, Tensor[] right, str precision) -> Tensor", check=check_sides)
def outer_direct(left: Sequence[Tensor], right: Sequence[Tensor], precision: str) -> Tensor:
    """`outer_gram` by rows, a tile of them at a time."""
    r, a, b = sum(t.shape[0] for t in left), left[0].shape[2], right[0].shape[2]
    gram = left[0].new_zeros(r, r, dtype=WIDE)
    step = max(1, BUFFER // max(r * b, 1))
    for start in range(0, a, step):
        tiles = [
            outer_rows(p[:, :, start : start + step], q) for p, q in zip(left, right, strict=True)
        ]
        gram += row_gram([t.flatten(1) for t in tiles])
    return gram


@outer_direct.fake
def _(left: Sequence[Tensor], right: Sequence[Tensor], precision: str) -> Tensor:
    return square(left)


@define("outer_ghost(Tensor[] left, Tensor[] right, str precision) -> Tensor", check=check_sides)
def outer_ghost(left: Sequence[Tensor], right: Sequence[Tensor], precision: str) -> Tensor:
    """`outer_gram` by products of positions, `Σ_{s,u} (left_rs · left_qu) (right_rs · right_qu)`."""
    if len(distinct(right)) < len(distinct(left)):
        left, right = right, left
    starts = offsets(left)
    gram = left[0].new_zeros(starts[-1], starts[-1], dtype=WIDE)
    groups = families(left)
    wide = {i: t.to(WIDE) for i, t in enumerate(right)}
    for f, family in enumerate(groups):
        a = left[family[0]].to(WIDE)
        for other in groups[f:]:
            c = a if family is other else left[other[0]].to(WIDE)
            for lo, hi in _strips(a.shape[0], a.shape[1] * c.shape[0] * c.shape[1]):
                # the upper triangle is enough
                cut = lo if family is other and len(family) == 1 else 0
                shared = a[lo:hi].flatten(0, 1) @ c[cut:].flatten(0, 1).T  # [strip·S, Q·U]
                for i, j in pairs(family, other):
                    tile = wide[i][lo:hi].flatten(0, 1) @ wide[j][cut:].flatten(0, 1).T
                    tile = (
                        tile
                        .mul_(shared)
                        .view(hi - lo, a.shape[1], c.shape[0] - cut, c.shape[1])
                        .sum((1, 3))
                    )
                    place(gram, tile, starts[i] + lo, starts[j] + cut)
    return gram


@outer_ghost.fake
def _(left: Sequence[Tensor], right: Sequence[Tensor], precision: str) -> Tensor:
    return square(left)


outer_ghost.triton("gram")


# ---- convolutions --------------------------------------------------------------------------------


def conv_gram(
    x: Sequence[Tensor], b: Sequence[Tensor], geometry: Geometry, precision: str = "highest"
) -> Tensor:
    """`G = J Jᵀ` of convolution weight gradients: blocks x `[R_i, F, C, *]`, b `[R_i, F, O, *]` -> float64 `[R, R]`."""
    check_sides(x, b, precision, axes=len(geometry.kernel))
    walk = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
    if not geometry.plain:
        return _by_rows(x, b, geometry, conv_rows)
    if conv_route(x, b, geometry) == "ghost":
        return conv_ghost(x, b, *walk, precision)
    return conv_direct(x, b, *walk, precision)


def _by_rows(
    x: Sequence[Tensor],
    b: Sequence[Tensor],
    geometry: Geometry,
    form: Callable[[Tensor, Tensor, Geometry], Tensor],
) -> Tensor:
    """`conv_gram` of rows formed by `form`, a tile of output channels at a time where they can be told apart."""
    r = sum(t.shape[0] for t in x)
    gram = x[0].new_zeros(r, r, dtype=WIDE)
    channels = b[0].shape[2]
    step = max(1, BUFFER // max(r * prod(geometry.weight[1:]), 1)) if geometry.plain else channels
    for start in range(0, channels, step):
        stop = min(start + step, channels)
        part = (
            replace(geometry, weight=(stop - start, *geometry.weight[1:]))
            if geometry.plain
            else geometry
        )
        tiles = [form(x_i, b_i[:, :, start:stop], part) for x_i, b_i in zip(x, b, strict=True)]
        gram += row_gram([t.flatten(1) for t in tiles])
    return gram


def conv_route(x: Sequence[Tensor], b: Sequence[Tensor], geometry: Geometry) -> str:
    """`"ghost"` (the pixel Gram, shifted) or `"direct"` (rows), whichever costs less."""
    return conv_cost(x, b, geometry).route


def conv_cost(x: Sequence[Tensor], b: Sequence[Tensor], geometry: Geometry) -> RouteCosts:
    """What the Gram of these blocks and a combination cost by each route."""
    price = prices(x[0].device)
    r, p, taps = sum(t.shape[0] for t in x), prod(geometry.weight), prod(geometry.kernel)
    pixels_out = sum(_positions(t) for t in b)
    ghost = inf
    if geometry.plain and (taps == 1 or all(prod(t.shape[3:]) <= price.image for t in x)):
        first = [(x[family[0]], b[family[0]]) for family in families(x)]
        if price.patches:
            pixels_in, width_in = sum(_positions(t) for _, t in first), taps * x[0].shape[2]
        else:
            pixels_in, width_in = (
                sum(_reached(t, u.shape[3:], geometry.kernel) for t, u in first),
                x[0].shape[2],
            )
        ghost = price.reduce * (taps * pixels_in**2 + pixels_out**2)
        for n, width in ((pixels_in, width_in), (pixels_out, b[0].shape[2])):
            ghost += (price.product * n + price.widen) * n * width
    seen, own = (sum(_positions(b[family[0]]) for family in families(side)) for side in (x, b))
    outputs = geometry.weight[1 if geometry.transposed else 0]
    form = _Forming(
        r, pixels_out, (p // max(outputs, 1), seen), (outputs, own), x[0].dtype == WIDE, taps > 1
    )
    calls = 0.0 if geometry.pointwise else r * price.weight_gradient(p)
    return _route_costs(price, ghost, form, fused=geometry.plain, calls=calls)


def _positions(t: Tensor) -> int:
    """Pixels of all images `[R, F, C, *]`."""
    return t.shape[0] * t.shape[1] * prod(t.shape[3:])


def _reached(x: Tensor, grid: Sequence[int], kernel: Sequence[int]) -> int:
    """How many pixels of x a tap reaches, at most."""
    return (
        x.shape[0]
        * x.shape[1]
        * prod(min(n, o * k) for n, o, k in zip(x.shape[3:], grid, kernel, strict=True))
    )


_WALK = "int[] kernel, int[] stride, int[] padding, int[] dilation"


@define(
    f"conv_direct(Tensor[] x, Tensor[] b, {_WALK}, str precision) -> Tensor", check=check_images
)
def conv_direct(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str,
) -> Tensor:  # fmt: skip
    """`conv_gram` of one group, forward, by rows, a tile of them at a time."""
    weight = (b[0].shape[2], x[0].shape[2], *kernel)
    geometry = Geometry(
        weight, tuple(stride), tuple(padding), tuple(dilation), False, (0,) * len(kernel), 1
    )
    return _by_rows(x, b, geometry, plain_rows)


@conv_direct.fake
def _(x: Sequence[Tensor], *_: object) -> Tensor:
    return square(x)


@define(f"conv_ghost(Tensor[] x, Tensor[] b, {_WALK}, str precision) -> Tensor", check=check_images)
def conv_ghost(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str,
) -> Tensor:  # fmt: skip
    """`conv_gram` of one group, forward, by products of positions: the patch Gram is made of shifted pixel Grams.

    `G[r, q] = Σ_{p,s} (Σ_δ x_r(p+δ)·x_q(s+δ)) (b_r(p)·b_q(s))`.
    """
    walk = Walk(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    starts = offsets(x)
    gram = x[0].new_zeros(starts[-1], starts[-1], dtype=WIDE)
    groups = families(x)
    gradients = {i: by_pixel(t) for i, t in enumerate(b)}
    for f, family in enumerate(groups):
        rows, mine = x[family[0]], b[family[0]]
        for other in groups[f:]:
            cols, theirs = x[other[0]], b[other[0]]
            grid = theirs.shape[3:]
            width = (
                mine.shape[1]
                * prod(mine.shape[3:])
                * theirs.shape[0]
                * theirs.shape[1]
                * prod(grid)
            )
            for lo, hi in _strips(rows.shape[0], width):
                cut = lo if family is other and len(family) == 1 else 0
                patches = patch_gram(rows[lo:hi], cols[cut:], mine.shape[3:], grid, walk)
                for i, j in pairs(family, other):
                    left, right = gradients[i][lo:hi], gradients[j][cut:]
                    tile = left.flatten(0, 1) @ right.flatten(0, 1).T
                    tile = (
                        tile
                        .mul_(patches)
                        .view(hi - lo, left.shape[1], len(right), right.shape[1])
                        .sum((1, 3))
                    )
                    place(gram, tile, starts[i] + lo, starts[j] + cut)
    return gram


@conv_ghost.fake
def _(x: Sequence[Tensor], *_: object) -> Tensor:
    return square(x)


conv_ghost.triton("gram")


# ---- table look-ups ------------------------------------------------------------------------------


@define(
    'gather_gram(Tensor[] index, Tensor[] values, str precision="highest") -> Tensor',
    check=check_lookups,
)
def gather_gram(
    index: Sequence[Tensor], values: Sequence[Tensor], precision: str = "highest"
) -> Tensor:
    """`G = J Jᵀ` of scattered rows: blocks index `[R_i, S_i]`, values `[R_i, S_i, D]` -> float64 `[R, R]`.

    Only table entries that occur are formed, a tile of them at a time.
    """
    r = sum(t.shape[0] for t in index)
    gram = values[0].new_zeros(r, r, dtype=WIDE)
    used, flat = torch.unique(torch.cat([t.flatten() for t in index]), return_inverse=True)
    compact = [
        c.view_as(t) for c, t in zip(flat.split([t.numel() for t in index]), index, strict=True)
    ]
    step = max(1, BUFFER // max(r * values[0].shape[2], 1))
    for start in range(0, used.numel(), step):
        size = min(step, used.numel() - start)
        tiles = []
        for where, value in zip(compact, values, strict=True):
            inside = (where >= start) & (where < start + size)
            tiles.append(
                gather_rows(
                    (where - start).clamp(0, size - 1), value * inside[..., None], size
                ).flatten(1)
            )
        gram += row_gram(tiles)
    return gram


@gather_gram.fake
def _(index: Sequence[Tensor], values: Sequence[Tensor], precision: str = "highest") -> Tensor:
    return square(values)


gather_gram.triton("gram")


# ---- outer products with table look-ups ----------------------------------------------------------


def _check_met(
    left: Sequence[Tensor], right: Sequence[Tensor], index: Sequence[Tensor], values: Sequence[Tensor],
    precision: str = "highest",
) -> None:  # fmt: skip
    check_sides(left, right, precision)
    check_lookups(index, values, precision)
    check_devices(left=left, values=values)
    if right[0].shape[2] != values[0].shape[2]:
        raise ValueError(
            f"the right sides have shape {tuple(right[0].shape)} and the values {tuple(values[0].shape)}, expected one "
            "width, that of the table."
        )


@define(
    'outer_gather(Tensor[] left, Tensor[] right, Tensor[] index, Tensor[] values, str precision="highest") -> Tensor',
    check=_check_met,
)
def outer_gather(
    left: Sequence[Tensor], right: Sequence[Tensor], index: Sequence[Tensor], values: Sequence[Tensor],
    precision: str = "highest",
) -> Tensor:  # fmt: skip
    """`C[r, q] = Σ_{s,t} left_rs[index_qt] (right_rs · values_qt)`: outer products met with scattered rows of a table.

    Blocks left `[R_i, S_i, A]`, right `[R_i, S_i, B]`, and index `[Q_j, T_j]` into A, values `[Q_j,
    T_j, B]` -> float64 `[R, Q]`. No row of the table's size is formed: a strip of products of
    positions, and the entries of `left` that they go with. Products with a right side that blocks
    share (the activations under several tasks) are made once.
    """
    starts, ends = offsets(left), offsets(index)
    found = left[0].new_zeros(starts[-1], ends[-1], dtype=WIDE)
    for j, (where, value) in enumerate(zip(index, values, strict=True)):
        (q, t), at = where.shape, where.flatten()
        theirs = value.to(WIDE).flatten(0, 1).T  # [B, Q·T]
        for family in families(right):
            mine = right[family[0]]
            step = max(1, TILE // max(q * t, 1))  # positions; of several rows where one has fewer
            for lo, hi in _strips(mine.shape[0], mine.shape[1] * q * t):
                for start in range(0, mine.shape[1], step):
                    part = mine[lo:hi, start : start + step].to(WIDE)
                    shared = part.flatten(0, 1) @ theirs
                    for i in family:
                        entries = left[i][lo:hi, start : start + step].index_select(2, at)
                        tile = shared * entries.flatten(0, 1)
                        met = tile.view(len(shared), q, t).sum(2).view(*part.shape[:2], q).sum(1)
                        found[starts[i] + lo : starts[i] + hi, ends[j] : ends[j + 1]] += met
    return found


@outer_gather.fake
def _(
    left: Sequence[Tensor], right: Sequence[Tensor], index: Sequence[Tensor], *_: object
) -> Tensor:
    return left[0].new_empty(
        sum(t.shape[0] for t in left), sum(t.shape[0] for t in index), dtype=WIDE
    )


def rows_pay_for_table(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    index: Sequence[Tensor],
    values: Sequence[Tensor],
) -> bool:
    """Whether explicit rows, a tile at a time, cost less than `outer_gram`, `gather_gram` and `outer_gather`.

    For a table that is multiplied (left, right) and looked up (index, values).
    """
    cost = costs(left[0].device)
    entries, width = left[0].shape[2], right[0].shape[2]
    multiplied = outer_cost(left, right)
    looked_up = sum(t.numel() for t in index)
    rows = sum(t.shape[0] for t in values)

    occurring = min(entries, looked_up)
    gather = (cost.row_product * rows + cost.row) * rows * occurring * width
    # A meeting of two positions is a product, and an entry that goes with it, each written and
    # read; plain torch makes all of them, of which `Costs.product` counts half.
    positions = sum(t.shape[0] * t.shape[1] for t in left)
    apart = sum(t.shape[0] * t.shape[1] for t in distinct(right))
    cross = 2 * looked_up * (cost.product * apart * width + cost.row * positions)

    reread = cost.row * rows * entries * width  # in `kept`: for the combination
    by_rows = multiplied.kept - reread + cost.row * looked_up * width
    return by_rows < min(multiplied.ghost, multiplied.direct) + gather + cross


def _strips(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose strip of `rows × width` elements is one tile."""
    step = max(1, TILE // max(width, 1))
    for lo in range(0, rows, step):
        yield lo, min(lo + step, rows)

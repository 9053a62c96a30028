"""`G = J Jᵀ` from what is known of the rows: explicit rows, outer products, convolutions, table look-ups.

One function per kind of use. Each takes the blocks of one parameter (one block per task and forward), returns the
float64 Gram of all their rows, and picks the cheaper of two routes:

* *direct*: the rows themselves, a tile of the parameter at a time, `Σ_tiles X Xᵀ` (the op `row_gram`);
* *ghost*: positions instead of parameters, `G[r, q] = Σ_{s,u} (left_rs · left_qu) (right_rs · right_qu)`, products of a
  side that blocks share (the activations under several tasks) made once (the ops `outer_ghost` and `conv_ghost`).

Sums are float64 everywhere: a float32 Gram loses half of the digits that a solve needs (see CONTRIBUTING.md).

`precision` says how exact the products under these sums must be, in torch's words: "highest", "high" (float32 products
may be TF32×3) or "medium" (TF32, or bfloat16 where the input is). It is a permission: a kernel may be more exact, and
plain torch is always at its highest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from math import prod

import torch
from torch import Tensor

from mtu_fast.ops._library import define

WIDE = torch.float64
PRECISIONS = ("highest", "high", "medium")
TILE = 1 << 18  # elements of a float64 tile that is read again at once: 2 MiB, what a core's cache holds
BUFFER = 1 << 22  # elements of explicit rows formed at a time: 16 MiB, below where allocators hand out fresh pages


@dataclass(frozen=True)
class Costs:
    """What a unit of work costs, relative to one float32 multiply-add inside a large product.

    Attributes:
        product: A multiply-add of two products of positions, of which half are made at most.
        reduce: Adding a shifted product of pixels, or multiplying two products and summing, an element.
        widen: Reading an element of the positions.
        row_product: A multiply-add between explicit rows, of which half are made at most.
        row: Writing an element of explicit rows and reading it back.
        call: A vendor call per sample.
        weight: The same, a weight element: small weights, large ones, and the border between them.
        image: Pixels of an image up to which products of pixels are made once; larger ones are cut, which costs more
            than this rule knows.
        patches: Whether products of positions are made of whole patches, tap by tap, not of pixels that are shifted.
    """

    product: float
    reduce: float
    widen: float
    row_product: float
    row: float
    call: float
    weight: tuple[float, float, int]
    image: int
    patches: bool = False


COSTS = {  # measured, see CONTRIBUTING.md
    "plain torch": Costs(2.0, 50.0, 0.0, 2.0, 40.0, 0.0, (30.0, 175.0, 1 << 19), 1 << 62),
    "cpu": Costs(0.5, 3.5, 20.0, 0.5, 20.0, 2.5e6, (25.0, 115.0, 1 << 19), 256),
    # Estimated from the data sheets of GPUs with fast float64: an element read costs 30, a launch 2e8. Not yet verified
    # on hardware.
    "cuda": Costs(0.5, 0.0, 30.0, 0.5, 40.0, 1e9, (0.0, 0.0, 0), 1 << 62, patches=True),
}


def costs(device: torch.device) -> Costs:
    """The costs of the kernels that serve `device`."""
    if device.type == "cpu" and not outer_ghost.has_kernel("CPU"):
        return COSTS["plain torch"]
    return COSTS.get(device.type, COSTS["plain torch"])


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks: kernel `(O, C/g, *k)` and the arguments of `aten::convolution`."""

    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps along each axis."""
        return self.weight[2:]

    @property
    def plain(self) -> bool:
        """One group, forward: the pixel Gram applies and output channels may be tiled."""
        return self.groups == 1 and not self.transposed


def working_dtype(t: Tensor) -> torch.dtype:
    """The dtype that row gradients are computed in: the input's, or float32 for half precision."""
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype


def check_blocks(precision: str, *sides: Sequence[Tensor]) -> None:
    """What every Gram here asks of its arguments.

    Raises:
        TypeError: complex blocks, of which kernels would read the real part alone.
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: found {precision!r}, expected one of {', '.join(map(repr, PRECISIONS))}.")
    for block in chain.from_iterable(sides):
        if block.is_complex():
            raise TypeError(
                f"found a block of {block.dtype}, expected real ones: the Gram of complex rows is that of "
                "torch.view_as_real(rows).flatten(1)."
            )


# ---- rows: what the direct route multiplies -------------------------------------------------------------------------


def outer_rows(left: Tensor, right: Tensor) -> Tensor:
    """`Σ_s left[r, s] ⊗ right[r, s]`: left `[R, S, A]`, right `[R, S, B]` -> `[R, A, B]`."""
    dtype = working_dtype(left)
    return torch.bmm(left.to(dtype).mT, right.to(dtype))


def conv_weight_gradient(x: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """The convolution's weight gradient summed over images: x `[F, C, *]`, b `[F, O, *]` -> `[O, C/g, *k]`."""
    # The backward asks the weight for its shape alone.
    weight = x.new_empty(1).expand(geometry.weight)
    return torch.ops.aten.convolution_backward(
        b, x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.transposed,
        geometry.output_padding, geometry.groups, (False, True, False),
    )[1]  # fmt: skip


def conv_rows(x: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """Weight gradients row by row: x `[R, F, C, *]`, b `[R, F, O, *]` -> `[R, O, C/g, *k]`."""
    dtype = working_dtype(x)
    out = x.new_empty(x.shape[0], *geometry.weight, dtype=dtype)
    for row, x_r, b_r in zip(out, x, b, strict=True):
        row.copy_(conv_weight_gradient(x_r.to(dtype), b_r.to(dtype), geometry))
    return out


def gather_rows(index: Tensor, values: Tensor, size: int) -> Tensor:
    """`Σ_s e_index[r, s] ⊗ values[r, s]`: index `[R, S]`, values `[R, S, D]` -> `[R, size, D]`."""
    r, _, d = values.shape
    offset = torch.arange(r, device=index.device)[:, None] * size
    out = values.new_zeros(r * size, d, dtype=working_dtype(values))
    out.index_add_(0, (index + offset).flatten(), values.to(out.dtype).flatten(0, 1))
    return out.view(r, size, d)


# ---- explicit rows --------------------------------------------------------------------------------------------------


def _check_rows(rows: Sequence[Tensor], known: int = 0) -> None:
    check_blocks("highest", rows)
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
    return _square(rows)


row_gram.triton("gram")


# ---- outer products -------------------------------------------------------------------------------------------------


def outer_gram(left: Sequence[Tensor], right: Sequence[Tensor], precision: str = "highest") -> Tensor:
    """`G = J Jᵀ` of rows `Σ_s left ⊗ right`: blocks left `[R_i, S_i, A]`, right `[R_i, S_i, B]` -> float64 `[R, R]`."""
    check_blocks(precision, left, right)
    route = outer_route(left, right)
    if route == "one position":
        return row_gram([t[:, 0] for t in left]).mul_(row_gram([t[:, 0] for t in right]))
    if route == "ghost":
        return outer_ghost(left, right, precision)
    r, a, b = sum(t.shape[0] for t in left), left[0].shape[2], right[0].shape[2]
    gram = left[0].new_zeros(r, r, dtype=WIDE)
    step = max(1, BUFFER // max(r * b, 1))
    for start in range(0, a, step):
        tiles = [outer_rows(p[:, :, start : start + step], q) for p, q in zip(left, right, strict=True)]
        gram += row_gram([t.flatten(1) for t in tiles])
    return gram


def outer_route(left: Sequence[Tensor], right: Sequence[Tensor]) -> str:
    """`"one position"`, `"ghost"` or `"direct"`, whichever costs least for these blocks."""
    if all(t.shape[1] == 1 for t in left):
        return "one position"
    r, a, b = sum(t.shape[0] for t in left), left[0].shape[2], right[0].shape[2]
    cost = costs(left[0].device)
    positions = sum(t.shape[0] * t.shape[1] for t in left)
    apart = [sum(t.shape[0] * t.shape[1] for t in _distinct(side)) for side in (left, right)]
    ghost = cost.reduce * positions**2
    ghost += sum((cost.product * n + cost.widen) * n * width for n, width in zip(apart, (a, b), strict=True))
    direct = positions * a * b + (cost.row_product * r + cost.row) * r * a * b
    return "ghost" if ghost < direct else "direct"


def _check_sides(left: Sequence[Tensor], right: Sequence[Tensor], precision: str = "highest") -> None:
    check_blocks(precision, left, right)


@define("outer_ghost(Tensor[] left, Tensor[] right, str precision) -> Tensor", check=_check_sides)
def outer_ghost(left: Sequence[Tensor], right: Sequence[Tensor], precision: str) -> Tensor:
    """`outer_gram` by products of positions, `Σ_{s,u} (left_rs · left_qu) (right_rs · right_qu)`."""
    if len(_distinct(right)) < len(_distinct(left)):
        left, right = right, left
    starts = _offsets(left)
    gram = left[0].new_zeros(starts[-1], starts[-1], dtype=WIDE)
    families = _families(left)
    wide = {i: t.to(WIDE) for i, t in enumerate(right)}
    for f, family in enumerate(families):
        a = left[family[0]].to(WIDE)
        for other in families[f:]:
            c = left[other[0]].to(WIDE)
            for lo, hi in _strips(a.shape[0], a.shape[1] * c.shape[0] * c.shape[1]):
                cut = lo if family is other and len(family) == 1 else 0  # the upper triangle is enough
                shared = a[lo:hi].flatten(0, 1) @ c[cut:].flatten(0, 1).T  # [strip·S, Q·U]
                for i, j in _pairs(family, other):
                    tile = wide[i][lo:hi].flatten(0, 1) @ wide[j][cut:].flatten(0, 1).T
                    tile = tile.mul_(shared).view(hi - lo, a.shape[1], c.shape[0] - cut, c.shape[1]).sum((1, 3))
                    _place(gram, tile, starts[i] + lo, starts[j] + cut)
    return gram


@outer_ghost.fake
def _(left: Sequence[Tensor], right: Sequence[Tensor], precision: str) -> Tensor:
    return _square(left)


outer_ghost.triton("gram")


# ---- convolutions ---------------------------------------------------------------------------------------------------

def conv_gram(x: Sequence[Tensor], b: Sequence[Tensor], geometry: Geometry, precision: str = "highest") -> Tensor:
    """`G = J Jᵀ` of convolution weight gradients: blocks x `[R_i, F, C, *]`, b `[R_i, F, O, *]` -> float64 `[R, R]`."""
    check_blocks(precision, x, b)
    if conv_route(x, b, geometry) == "ghost":
        return conv_ghost(x, b, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, precision)
    r = sum(t.shape[0] for t in x)
    gram = x[0].new_zeros(r, r, dtype=WIDE)
    channels = b[0].shape[2]
    step = max(1, BUFFER // max(r * prod(geometry.weight[1:]), 1)) if geometry.plain else channels
    for start in range(0, channels, step):
        stop = min(start + step, channels)
        part = replace(geometry, weight=(stop - start, *geometry.weight[1:])) if geometry.plain else geometry
        tiles = [conv_rows(x_i, b_i[:, :, start:stop], part) for x_i, b_i in zip(x, b, strict=True)]
        gram += row_gram([t.flatten(1) for t in tiles])
    return gram


def conv_route(x: Sequence[Tensor], b: Sequence[Tensor], geometry: Geometry) -> str:
    """`"ghost"` (the pixel Gram, shifted) or `"direct"` (a vendor call per row), whichever costs less."""
    if not geometry.plain:
        return "direct"
    cost = costs(x[0].device)
    r, p, taps = sum(t.shape[0] for t in x), prod(geometry.weight), prod(geometry.kernel)
    if taps > 1 and any(prod(t.shape[3:]) > cost.image for t in x):
        return "direct"
    first = [(x[family[0]], b[family[0]]) for family in _families(x)]
    pixels_out = sum(_positions(t) for t in b)
    if cost.patches:
        pixels_in, width_in = sum(_positions(t) for _, t in first), taps * x[0].shape[2]
    else:
        pixels_in, width_in = sum(_reached(t, u.shape[3:], geometry.kernel) for t, u in first), x[0].shape[2]
    ghost = cost.reduce * (taps * pixels_in**2 + pixels_out**2)
    for n, width in ((pixels_in, width_in), (pixels_out, b[0].shape[2])):
        ghost += (cost.product * n + cost.widen) * n * width
    small, large, border = cost.weight
    call = cost.call + (large if p > border else small) * p
    direct = pixels_out * p + r * ((cost.row_product * r + cost.row) * p + call)
    return "ghost" if ghost < direct else "direct"


def _positions(t: Tensor) -> int:
    """Pixels of all images `[R, F, C, *]`."""
    return t.shape[0] * t.shape[1] * prod(t.shape[3:])


def _reached(x: Tensor, grid: Sequence[int], kernel: Sequence[int]) -> int:
    """How many pixels of x a tap reaches, at most."""
    return x.shape[0] * x.shape[1] * prod(min(n, o * k) for n, o, k in zip(x.shape[3:], grid, kernel, strict=True))


_CONV_GHOST = (
    "conv_ghost(Tensor[] x, Tensor[] b, int[] kernel, int[] stride, int[] padding, int[] dilation, str precision)"
    " -> Tensor"
)


def _check_images(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str,
) -> None:  # fmt: skip
    check_blocks(precision, x, b)


@define(_CONV_GHOST, check=_check_images)
def conv_ghost(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str,
) -> Tensor:  # fmt: skip
    """`conv_gram` of one group, forward, by products of positions: the patch Gram is made of shifted pixel Grams.

    `G[r, q] = Σ_{p,s} (Σ_δ x_r(p+δ)·x_q(s+δ)) (b_r(p)·b_q(s))`.
    """
    walk = _Walk(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    starts = _offsets(x)
    gram = x[0].new_zeros(starts[-1], starts[-1], dtype=WIDE)
    families = _families(x)
    gradients = {i: _pixels(t) for i, t in enumerate(b)}
    for f, family in enumerate(families):
        rows, mine = x[family[0]], b[family[0]]
        for other in families[f:]:
            cols, theirs = x[other[0]], b[other[0]]
            grid = theirs.shape[3:]
            width = mine.shape[1] * prod(mine.shape[3:]) * theirs.shape[0] * theirs.shape[1] * prod(grid)
            for lo, hi in _strips(rows.shape[0], width):
                cut = lo if family is other and len(family) == 1 else 0
                patches = _patch_gram(rows[lo:hi], cols[cut:], mine.shape[3:], grid, walk)
                for i, j in _pairs(family, other):
                    left, right = gradients[i][lo:hi], gradients[j][cut:]
                    tile = left.flatten(0, 1) @ right.flatten(0, 1).T
                    tile = tile.mul_(patches).view(hi - lo, left.shape[1], len(right), right.shape[1]).sum((1, 3))
                    _place(gram, tile, starts[i] + lo, starts[j] + cut)
    return gram


@conv_ghost.fake
def _(x: Sequence[Tensor], *_: object) -> Tensor:
    return _square(x)


conv_ghost.triton("gram")


@dataclass(frozen=True)
class _Walk:
    """Where a convolution's taps fall."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def _patch_gram(x: Tensor, y: Tensor, grid_x: Sequence[int], grid_y: Sequence[int], walk: _Walk) -> Tensor:
    """Inner products of all patches of x `[R, F, C, *]` with all of y, `[R·F·positions, Q·F·positions]`."""
    n, m, d = x.shape[0] * x.shape[1], y.shape[0] * y.shape[1], len(grid_x)
    pixels = _pixels(x).flatten(0, 1) @ _pixels(y).flatten(0, 1).T
    pixels = pixels.view(n, *x.shape[3:], m, *y.shape[3:])
    out = pixels.new_zeros(n, *grid_x, m, *grid_y)
    for delta in product(*(range(k) for k in walk.kernel)):
        here, there = zip(
            *(_windows(delta, axis, x.shape[3 + axis], grid_x[axis], walk) for axis in range(d)), strict=True
        )
        here_y, there_y = zip(
            *(_windows(delta, axis, y.shape[3 + axis], grid_y[axis], walk) for axis in range(d)), strict=True
        )
        full = slice(None)
        out[(full, *here, full, *here_y)] += pixels[(full, *there, full, *there_y)]
    return out.view(n * prod(grid_x), m * prod(grid_y))


def _windows(delta: Sequence[int], axis: int, size: int, grid: int, walk: _Walk) -> tuple[slice, slice]:
    """Output positions whose tap at delta falls inside the image, and where it falls, along one axis."""
    stride, shift = walk.stride[axis], delta[axis] * walk.dilation[axis] - walk.padding[axis]
    first = max(0, -(shift // stride))  # the least p with p·stride + shift >= 0
    last = min(grid, (size - 1 - shift) // stride + 1)
    last = max(first, last)
    start = first * stride + shift
    return slice(first, last), slice(start, start + max(0, (last - first - 1) * stride + (last > first)), stride)


def _pixels(t: Tensor) -> Tensor:
    """`[R, F, C, *]` -> float64 `[R, F·positions, C]`."""
    return t.flatten(3).to(WIDE).mT.flatten(1, 2)


# ---- table look-ups -------------------------------------------------------------------------------------------------


@define('gather_gram(Tensor[] index, Tensor[] values, str precision="highest") -> Tensor', check=_check_sides)
def gather_gram(index: Sequence[Tensor], values: Sequence[Tensor], precision: str = "highest") -> Tensor:
    """`G = J Jᵀ` of scattered rows: blocks index `[R_i, S_i]`, values `[R_i, S_i, D]` -> float64 `[R, R]`.

    Only table entries that occur are formed, a tile of them at a time.
    """
    r = sum(t.shape[0] for t in index)
    gram = values[0].new_zeros(r, r, dtype=WIDE)
    used, flat = torch.unique(torch.cat([t.flatten() for t in index]), return_inverse=True)
    compact = [c.view_as(t) for c, t in zip(flat.split([t.numel() for t in index]), index, strict=True)]
    step = max(1, BUFFER // max(r * values[0].shape[2], 1))
    for start in range(0, used.numel(), step):
        size = min(step, used.numel() - start)
        tiles = []
        for where, value in zip(compact, values, strict=True):
            inside = (where >= start) & (where < start + size)
            tiles.append(gather_rows((where - start).clamp(0, size - 1), value * inside[..., None], size).flatten(1))
        gram += row_gram(tiles)
    return gram


@gather_gram.fake
def _(index: Sequence[Tensor], values: Sequence[Tensor], precision: str = "highest") -> Tensor:
    return _square(values)


gather_gram.triton("gram")


# ---- shared pieces --------------------------------------------------------------------------------------------------


def _square(blocks: Sequence[Tensor]) -> Tensor:
    r = sum(t.shape[0] for t in blocks)
    return blocks[0].new_empty(r, r, dtype=WIDE)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one and the same memory, seen alike."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _families(blocks: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the blocks, those that are one and the same tensor together."""
    families: list[list[int]] = []
    for i, block in enumerate(blocks):
        for family in families:
            if same(blocks[family[0]], block):
                family.append(i)
                break
        else:
            families.append([i])
    return families


def _distinct(blocks: Sequence[Tensor]) -> list[Tensor]:
    return [blocks[family[0]] for family in _families(blocks)]


def _pairs(family: list[int], other: list[int]) -> Iterator[tuple[int, int]]:
    """Pairs of blocks of two families, each unordered pair once."""
    return ((i, j) for i, j in product(family, other) if family is not other or i <= j)


def _place(gram: Tensor, tile: Tensor, row: int, column: int) -> None:
    """Write a tile and its mirror image."""
    height, width = tile.shape
    gram[row : row + height, column : column + width] = tile
    gram[column : column + width, row : row + height] = tile.T


def _offsets(blocks: Sequence[Tensor]) -> list[int]:
    starts = [0]
    for block in blocks:
        starts.append(starts[-1] + block.shape[0])
    return starts


def _strips(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose strip of `rows × width` elements is one tile."""
    step = max(1, TILE // max(width, 1))
    for lo in range(0, rows, step):
        yield lo, min(lo + step, rows)

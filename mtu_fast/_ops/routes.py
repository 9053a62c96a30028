"""Which route a Gram takes: what each costs on what serves a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from math import inf, prod

import torch
from torch import Tensor

from mtu_fast._ops._blocks import WIDE, distinct, families
from mtu_fast._ops._convolution import Geometry
from mtu_fast._ops._pooling import Into, rows_of_gram
from mtu_fast._ops._prices import OF_KERNELS, PLAIN_TORCH, Prices
from mtu_fast._ops._route_costs import Forming, RouteCosts, cost_of
from mtu_fast._ops.outer_ghost import outer_ghost

# Positions of all rows above which a call of a parameter's own takes less than its share of one call
# for several: measured on a CPU.
TOGETHER = 48


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
    plans = import_module("mtu_fast.kernels.plans")
    major, minor = torch.cuda.get_device_capability(device)
    arch = 10 * major + minor
    made = (plans.row_plan(dtype, 1, arch), plans.ghost_plan(dtype, precision, arch))
    return any(plan is not None and plan.sums != WIDE for plan in made)


# ---- outer products ------------------------------------------------------------------------------


def outer_route(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    into: Into = (),
    precision: str = "highest",
) -> str:
    """`"rank one"` (rows of one position), or `"ghost"` or `"direct"`, whichever costs least for these blocks."""
    if all(t.shape[1] == 1 for t in left):
        return "rank one"
    return outer_cost(left, right, into, precision).route


def outer_cost(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    into: Into = (),
    precision: str = "highest",
) -> RouteCosts:
    """What the Gram of these blocks, of more than one position, and a combination cost by each route."""
    rows = sum(t.shape[0] for t in left)
    met = rows_of_gram(into, rows)
    # a side that several blocks share is multiplied once
    inputs = left[0].shape[2], _rows_and_positions(distinct(left))
    outputs = right[0].shape[2], _rows_and_positions(distinct(right))
    price, dtype = prices(left[0].device), left[0].dtype
    each = price.multiply_add(dtype, precision)
    formed = Forming(
        met, _rows_and_positions(left), inputs, outputs, dtype == WIDE, multiply_add=each
    )
    return _outer_cost(price, formed)


def meet_together(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether the positions of these blocks are to be met by one call with those of other parameters."""
    price = prices(left[0].device)
    if price.call_apart == 0 or _rows_and_positions(left) > TOGETHER:
        return False
    cost = outer_cost(left, right)
    return cost.ghost <= cost.direct + price.call_apart


def _rows_and_positions(blocks: Sequence[Tensor]) -> int:
    """Positions of all rows of blocks `[R, S, width]`."""
    return sum(t.shape[0] * t.shape[1] for t in blocks)


@lru_cache(maxsize=4096)
def _outer_cost(price: Prices, formed: Forming) -> RouteCosts:
    # every pair of positions is a product of two products, summed
    ghost = price.reduce * formed.positions**2
    product = price.product * formed.multiply_add
    for width, n in (formed.left, formed.right):
        ghost += (product * n + price.widen) * n * width
    return cost_of(price, ghost, formed, fused=True, calls=0.0)


def rows_pay_for_table(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    index: Sequence[Tensor],
    values: Sequence[Tensor],
) -> bool:
    """Whether explicit rows, a tile at a time, cost less than `outer_gram`, `gather_gram` and `outer_gather`.

    For a table that is multiplied (left, right) and looked up (index, values).
    """
    price = prices(left[0].device)
    entries, width = left[0].shape[2], right[0].shape[2]
    multiplied = outer_cost(left, right)
    looked_up = sum(t.numel() for t in index)
    rows = sum(t.shape[0] for t in values)

    # entries that are not looked up are not formed
    occurring = min(entries, looked_up)
    gather = (price.row_product * rows + price.row) * rows * occurring * width
    # A meeting of two positions is a product, and an entry that goes with it, each written and
    # read; plain torch makes all of them, of which `Prices.product` counts half.
    positions = _rows_and_positions(left)
    apart = _rows_and_positions(distinct(right))
    cross = 2 * looked_up * (price.product * apart * width + price.row * positions)

    reread = price.row * rows * entries * width  # in `kept`: for the combination
    by_rows = multiplied.kept - reread + price.row * looked_up * width
    return by_rows < min(multiplied.ghost, multiplied.direct) + gather + cross


# ---- convolutions --------------------------------------------------------------------------------


def conv_route(
    x: Sequence[Tensor],
    b: Sequence[Tensor],
    geometry: Geometry,
    into: Into = (),
    precision: str = "highest",
) -> str:
    """`"ghost"` (the pixel Gram, shifted) or `"direct"` (rows), whichever costs less."""
    return conv_cost(x, b, geometry, into, precision).route


def conv_cost(
    x: Sequence[Tensor],
    b: Sequence[Tensor],
    geometry: Geometry,
    into: Into = (),
    precision: str = "highest",
) -> RouteCosts:
    """What the Gram of these blocks and a combination cost by each route."""
    price, dtype = prices(x[0].device), x[0].dtype
    each = price.multiply_add(dtype, precision)
    rows = sum(t.shape[0] for t in x)
    met = rows_of_gram(into, rows)
    weights = prod(geometry.weight)
    pixels_out = sum(_positions(t) for t in b)
    # a side that several blocks share is multiplied once
    seen = sum(_positions(b[family[0]]) for family in families(x))
    own = sum(_positions(b[family[0]]) for family in families(b))
    channels = geometry.weight[1 if geometry.transposed else 0]
    inputs = weights // max(channels, 1)
    has_taps = prod(geometry.kernel) > 1
    form = Forming(met, pixels_out, (inputs, seen), (channels, own), dtype == WIDE, has_taps, each)
    calls = 0.0
    if not geometry.pointwise:
        calls = price.weight_gradients(rows, weights)
    ghost = _conv_ghost_cost(price, x, b, geometry, each)
    return cost_of(price, ghost, form, fused=geometry.plain, calls=calls)


def _conv_ghost_cost(
    price: Prices,
    x: Sequence[Tensor],
    b: Sequence[Tensor],
    geometry: Geometry,
    multiply_add: float,
) -> float:
    """What a Gram from positions costs; infinity where the op is not for these blocks."""
    taps = prod(geometry.kernel)
    small = all(prod(t.shape[3:]) <= price.image for t in x)
    if not geometry.plain or (taps > 1 and not small):
        return inf
    pixels, width = _met_pixels(price, x, b, geometry)
    positions = sum(_positions(t) for t in b)
    found = price.reduce * (taps * pixels**2 + positions**2)
    product = price.product * multiply_add
    for n, wide in ((pixels, width), (positions, b[0].shape[2])):
        found += (product * n + price.widen) * n * wide
    return found


def _met_pixels(
    price: Prices, x: Sequence[Tensor], b: Sequence[Tensor], geometry: Geometry
) -> tuple[int, int]:
    """How many pixels, or patches, are multiplied with one another, and how wide they are."""
    first = [(x[family[0]], b[family[0]]) for family in families(x)]
    channels = x[0].shape[2]
    if price.patches:
        return sum(_positions(t) for _, t in first), prod(geometry.kernel) * channels
    return sum(_reached(t, u.shape[3:], geometry.kernel) for t, u in first), channels


def _positions(t: Tensor) -> int:
    """Pixels of all images `[R, F, C, *]`."""
    return t.shape[0] * t.shape[1] * prod(t.shape[3:])


def _reached(x: Tensor, grid: Sequence[int], kernel: Sequence[int]) -> int:
    """How many pixels of x a tap reaches, at most."""
    along = [min(n, o * k) for n, o, k in zip(x.shape[3:], grid, kernel, strict=True)]
    return x.shape[0] * x.shape[1] * prod(along)

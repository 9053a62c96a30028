"""What a Gram costs by each route, from what forming rows takes."""

from __future__ import annotations

from typing import NamedTuple

from mtu_fast._ops._prices import Prices

PANELS = (12, 128)  # columns, and bytes, of the panels in csrc/cpu/direct.cpp
TILE_PANELS = (8, 170)  # wide panels of a tile there: at least, and divided by the rows


class RouteCosts(NamedTuple):
    """What is known of one parameter's Gram and of a combination of its rows, in the unit of `Prices`.

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


class Forming(NamedTuple):
    """What it takes to form rows: positions of all of them; columns and distinct positions of either side."""

    rows: int
    positions: int
    left: tuple[int, int]
    right: tuple[int, int]
    double: bool
    patches: bool = False
    multiply_add: float = 1.0  # of these rows, see `Prices`

    @property
    def columns(self) -> int:
        return self.left[0] * self.right[0]

    @property
    def work(self) -> float:
        """All multiply-adds; one of float64 counts twice."""
        each = 2.0 if self.double else self.multiply_add
        return each * self.positions * self.columns

    def in_cache(self, price: Prices) -> float:
        """By panels of columns, broken ones as whole ones; the taller side is laid out for every tile of the other."""
        (tall, far), (wide, near) = self.left, self.right
        if tall < wide and not self.patches:  # patches are never laid out whole
            (tall, far), (wide, near) = self.right, self.left
        height, lanes = PANELS[0], PANELS[1] // (8 if self.double else 4)
        down, across = -(-tall // height), -(-wide // lanes)
        # broken panels take as long as whole ones
        whole = down * height * across * lanes / self.columns
        tiles = -(-across // max(TILE_PANELS[0], TILE_PANELS[1] // self.rows))
        laid_out = price.pack * (near * wide + far * tall * tiles)
        each = (price.row_product * self.rows + (price.tile or 0.0)) * self.rows * self.columns
        return whole * (self.work + each) + laid_out


def cost_of(price: Prices, ghost: float, form: Forming, *, fused: bool, calls: float) -> RouteCosts:
    """The cost where a Gram from positions costs `ghost`; fused: rows are formed in cache; calls: beside the work."""
    if not form.columns or not form.rows:
        return RouteCosts(ghost, 0.0, 0.0, 0.0)
    products, written = (
        price.row_product * form.rows**2 * form.columns,
        price.row * form.rows * form.columns,
    )
    work = form.work
    formed = work + calls + written + products
    direct = form.in_cache(price) if fused and price.tile is not None else formed
    return RouteCosts(ghost, direct, work, formed + written)

"""What the routes of a Gram cost on each device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What a unit of work costs, relative to one float32 multiply-add inside a large product.

    Attributes:
        product: A multiply-add of two products of positions, of which half are made at most.
        reduce: Adding a shifted product of pixels, or multiplying two products and summing, an element.
        widen: Reading an element of the positions.
        row_product: A multiply-add between rows, of which half are made at most.
        row: Writing an element of explicit rows and reading it back.
        tile: The same in cache, where a kernel forms rows and multiplies them at once; None without such a kernel.
        pack: Laying out an element of the positions for it.
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
    tile: float | None
    pack: float
    call: float
    weight: tuple[float, float, int]
    image: int
    patches: bool = False


COSTS = {  # measured, see CONTRIBUTING.md
    "plain torch": Costs(2.0, 50.0, 0.0, 2.0, 40.0, None, 0.0, 0.0, (30.0, 175.0, 1 << 19), 1 << 62),
    "cpu": Costs(0.9, 6.0, 36.0, 1.0, 36.0, 8.0, 16.0, 4.5e6, (45.0, 205.0, 1 << 19), 256),
    # Estimated from the data sheets of GPUs with fast float64: an element read costs 30, a launch 2e8. Not yet verified
    # on hardware.
    "cuda": Costs(0.5, 0.0, 30.0, 0.5, 40.0, None, 0.0, 1e9, (0.0, 0.0, 0), 1 << 62, patches=True),
}

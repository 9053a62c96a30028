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

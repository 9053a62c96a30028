"""What a unit of work takes on each device: constants from which the cost of a Gram by either route is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prices:
    """The price of a unit of each kind of work, relative to one float32 multiply-add inside a large product.

    Attributes:
        product: A multiply-add of two products of positions, of which half are made at most.
        reduce: Adding a shifted product of pixels, or multiplying two products and summing, an
            element.
        widen: Reading an element of the positions.
        row_product: A multiply-add between rows, of which half are made at most.
        row: Writing an element of explicit rows and reading it back.
        tile: The same in cache, where a kernel forms rows and multiplies them at once; None without
            such a kernel.
        pack: Laying out an element of the positions for it.
        call: A vendor call per sample.
        small_weight: The same, an element of a weight of up to `border` elements.
        large_weight: The same, an element of a larger weight.
        border: Elements of a weight.
        launches: Rows of a convolution, whatever their number, where one launch makes all of them.
        image: Pixels of an image up to which products of pixels are made once; larger ones are cut,
            which costs more than this rule knows.
        call_apart: A Gram of one parameter by a call of its own, beside the work; 0 where no call is
            saved by taking several parameters together.
        patches: Whether products of positions are made of whole patches, tap by tap, not of pixels
            that are shifted.
        half: A multiply-add of half precision, whose rows are float32.
        high, medium: One of float32 where this `precision` allows TF32×3, or TF32.
    """

    product: float
    reduce: float
    widen: float
    row_product: float
    row: float
    tile: float | None
    pack: float
    call: float
    small_weight: float
    large_weight: float
    border: int
    image: int
    launches: float = 0.0
    call_apart: float = 0.0
    patches: bool = False
    half: float = 1.0
    high: float = 1.0
    medium: float = 1.0

    def multiply_add(self, dtype: torch.dtype, precision: str) -> float:
        """One of rows of this dtype, over one of float32 at its highest."""
        if dtype.itemsize == 2:
            return self.half
        of_precision = {"high": self.high, "medium": self.medium}
        return 1.0 if dtype == torch.float64 else of_precision.get(precision, 1.0)

    def weight_gradients(self, rows: int, elements: int) -> float:
        """What rows of a convolution take beside their multiply-adds, of weights of so many elements."""
        each = self.large_weight if elements > self.border else self.small_weight
        return rows * (self.call + each * elements) + self.launches


# Measured: benchmarks/NOTES.md says on what machine, and how long a unit is there.
PLAIN_TORCH = Prices(
    product=2.0,
    reduce=50.0,
    widen=0.0,
    row_product=2.0,
    row=40.0,
    tile=None,
    pack=0.0,
    call=0.0,
    small_weight=30.0,
    large_weight=175.0,
    border=1 << 19,
    image=1 << 62,
)
CPU_KERNELS = Prices(
    product=0.9,
    reduce=6.0,
    widen=36.0,
    row_product=1.0,
    row=36.0,
    tile=8.0,
    pack=16.0,
    call=4.5e6,
    small_weight=45.0,
    large_weight=205.0,
    border=1 << 19,
    image=256,
    call_apart=1e6,
)
# Estimated from the data sheets of GPUs with fast float64: an element read costs 30, a launch 2e8,
# of which rows take one more than positions, and a parameter of its own three: positions, their sums,
# and the addition to those of others. Not yet verified on hardware.
CUDA_KERNELS = Prices(
    product=0.5,
    reduce=0.0,
    widen=30.0,
    row_product=0.5,
    row=40.0,
    tile=None,
    pack=0.0,
    call=0.0,
    small_weight=0.0,
    large_weight=0.0,
    border=0,
    image=1 << 62,
    launches=2e8,
    call_apart=6e8,
    patches=True,
    half=0.125,
    high=0.75,
    medium=0.25,
)
OF_KERNELS = {"cpu": CPU_KERNELS, "cuda": CUDA_KERNELS}

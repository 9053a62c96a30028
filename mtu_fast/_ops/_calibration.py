"""The planner's constants measured on this machine, by a second of small calls (`python -m mtu_fast calibrate`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mtu_fast._ops._convolution import Geometry, conv_weight_gradient
from mtu_fast._ops._costs import COSTS, Costs
from mtu_fast._ops.explicit import outer_rows
from mtu_fast._ops.gram import outer_direct, outer_ghost, row_gram

FAR = 10.0  # times as much as shipped, or as little, is taken for a disturbed measurement
ROUNDS = 5  # the fastest counts

SIDE = 1024  # of the square product whose multiply-add is the unit
POSITIONS, WIDTHS = (256, 1024), (64, 512)
ROWS, COLUMNS = (16, 64), 1 << 15
TALL, EDGE = 16, 512  # rows of one position, and the sides of their matrices
# of convolutions on either side of `Costs.weight`'s border
CHANNELS, TAPS, PIXELS = (128, 512), 9, 4

Call = Callable[[], object]


def calls(device: torch.device) -> dict[str, Call]:
    """What is timed; `solve` knows what each is made of."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def ghost(positions: int, width: int) -> Call:
        side = drawn(positions // 64, 64, width)
        return lambda: outer_ghost([side], [side], "highest")

    def rows(count: int) -> Call:
        explicit = drawn(count, COLUMNS)
        return lambda: row_gram([explicit])

    def convolution(channels: int) -> Call:
        image = drawn(1, channels, 2, 2)
        geometry = Geometry((channels, channels, 3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
        return lambda: conv_weight_gradient(image, image, geometry)

    square, side = drawn(SIDE, SIDE), drawn(TALL, 1, EDGE)
    return {
        "unit": lambda: square @ square,
        **{f"ghost {n} {width}": ghost(n, width) for n in POSITIONS for width in WIDTHS},
        **{f"rows {count}": rows(count) for count in ROWS},
        "tile": lambda: outer_direct([side], [side], "highest"),
        "row": lambda: row_gram([outer_rows(side, side).flatten(1)]),
        "call": convolution(1),
        **{f"weight {channels}": convolution(channels) for channels in CHANNELS},
    }


def solve(seconds: Mapping[str, float], shipped: Costs) -> Costs:
    """The constants that explain these times; where one comes out absurd, a bound on the shipped one."""
    unit = seconds["unit"] / SIDE**3
    units = {name: t / unit for name, t in seconds.items()}
    (few, many), (narrow, wide) = POSITIONS, WIDTHS

    def per_element(n: int) -> float:  # product · n + widen
        return (units[f"ghost {n} {wide}"] - units[f"ghost {n} {narrow}"]) / (
            2 * n * (wide - narrow)
        )

    product = (per_element(many) - per_element(few)) / (many - few)
    widen = per_element(few) - product * few
    reduce = units[f"ghost {many} {narrow}"] / many**2 - 2 * per_element(many) * narrow / many
    less, more = (units[f"rows {count}"] / (count * COLUMNS) for count in ROWS)
    row_product = (more - less) / (ROWS[1] - ROWS[0])
    tile, row = (
        units[name] / (TALL * EDGE**2) - 1 - row_product * TALL for name in ("tile", "row")
    )
    small, large = (
        (units[f"weight {channels}"] - units["call"]) / (TAPS * channels**2) - PIXELS
        for channels in CHANNELS
    )
    return replace(
        shipped,
        product=_near(product, shipped.product),
        reduce=_near(reduce, shipped.reduce),
        widen=_near(widen, shipped.widen),
        row_product=_near(row_product, shipped.row_product),
        row=_near(row, shipped.row),
        tile=None if shipped.tile is None else _near(tile, shipped.tile),
        call=_near(units["call"], shipped.call),
        weight=(
            _near(small, shipped.weight[0]),
            _near(large, shipped.weight[1]),
            shipped.weight[2],
        ),
    )


def _near(value: float, shipped: float) -> float:
    if shipped == 0:  # not known, so anything may be
        return max(value, 0.0)
    return min(max(value, shipped / FAR), shipped * FAR)


def measure(device: torch.device) -> Costs:
    """The costs of this machine's `device`, which has kernels: about a second of its time."""
    return solve(
        {name: _seconds(call, device) for name, call in calls(device).items()}, COSTS[device.type]
    )


def _seconds(call: Call, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(ROUNDS + 1):  # the first is not counted: it compiles, and touches the memory
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])

"""What the ops ask of their arguments: kinds, devices, shapes, and sizes that can be counted and held.

Checks run before anything is allocated, whichever way an op is called. The kernels of `csrc` check
the same by `csrc/bindings/arguments.h`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from mtu_fast._arguments import check_one_of

PRECISIONS = ("highest", "high", "medium")
MOST_ELEMENTS = 1 << 40  # of a block or a result: more than a machine holds
MOST_STEP = (1 << 31) - 1  # a kernel's taps, stride, padding or dilation along an axis
# Pixels of an image with its padding, and of what a dilated kernel spans: so many, or so many times
# those of the image.
FEW_PIXELS, PADDED = 1 << 20, 64
MOST_MEETINGS = 1 << 36  # of positions and taps, in an image


# ---- blocks --------------------------------------------------------------------------------------


def check_blocks(precision: str, **sides: Sequence[Tensor]) -> None:
    """Blocks of real floating numbers, on one device, of countable sizes.

    Raises:
        TypeError: complex or whole numbers, of which kernels would read something else, or a
            sparse block.
        ValueError: an unknown precision, several devices, or sizes beyond what a machine holds.
    """
    check_one_of("precision", precision, PRECISIONS)
    for name, side in sides.items():
        for i, block in enumerate(side):
            check_numbers(f"{name}[{i}]", block)
            check_size(f"{name}[{i}]", block)
    check_devices(**sides)
    for name, side in sides.items():
        check_rows(name, side)


def check_numbers(name: str, block: Tensor) -> None:
    """A dense tensor of real floating numbers.

    Raises:
        TypeError: it is something else.
    """
    if block.is_complex():
        raise TypeError(
            f"{name}: found a block of {block.dtype}, expected real ones: the Gram of complex rows is "
            "that of torch.view_as_real(rows).flatten(1)."
        )
    if not block.is_floating_point():
        raise TypeError(
            f"{name} is of {block.dtype}, expected a floating dtype; convert it by .float()."
        )
    check_dense(name, block)


def check_dense(name: str, block: Tensor) -> None:
    """A tensor with strides.

    Raises:
        TypeError: a sparse one.
    """
    if block.layout != torch.strided:
        raise TypeError(
            f"{name} has the layout {block.layout}, expected a dense tensor; convert it by .to_dense()."
        )


def check_size(name: str, block: Tensor) -> None:
    """A tensor of no more elements than a machine holds, sizes of 0 aside.

    Raises:
        ValueError: there are more.
    """
    elements = block.numel() or prod([max(size, 1) for size in block.shape])
    if elements > MOST_ELEMENTS:
        raise ValueError(
            f"{name} has shape {tuple(block.shape)}, expected at most 2**40 elements, sizes of 0 aside."
        )


def check_devices(**sides: Sequence[Tensor]) -> None:
    """All blocks on one device.

    Raises:
        ValueError: there are several.
    """
    first: tuple[str, torch.device] | None = None
    for name, side in sides.items():
        for i, block in enumerate(side):
            first = first or (f"{name}[{i}]", block.device)
            if block.device != first[1]:
                raise ValueError(
                    f"{name}[{i}] is on {block.device}, {first[0]} on {first[1]}; move them to one device."
                )


def check_explicit(rows: Sequence[Tensor]) -> None:
    """Blocks of rows `[R_i, P]`.

    Raises:
        TypeError: blocks that are not of real floating numbers.
        ValueError: there are none, or they are of different widths or on several devices.
    """
    check_blocks("highest", rows=rows)
    if not rows:
        raise ValueError("rows: found no block, expected one at least.")
    for i, block in enumerate(rows):
        if block.dim() != 2 or block.shape[1] != rows[0].shape[1]:
            raise ValueError(
                f"rows[{i}] has shape {tuple(block.shape)}, rows[0] {tuple(rows[0].shape)}, expected [R_i, P], one "
                "width in all blocks."
            )


def check_rows(name: str, blocks: Sequence[Tensor]) -> None:
    """Few enough rows for a Gram.

    Raises:
        ValueError: there are more.
    """
    rows = sum(t.shape[0] for t in blocks if t.dim())
    if rows * rows > MOST_ELEMENTS:
        raise ValueError(f"{name} has {rows} rows in all, expected at most 2**20, for a Gram.")


def check_known(known: int, rows: int) -> None:
    """How many of so many rows have products that are known.

    Raises:
        ValueError: more than there are, or fewer than none.
    """
    if not 0 <= known <= rows:
        raise ValueError(f"known: found {known}, expected a number of rows, from 0 to {rows}.")


def check_sides(
    left: Sequence[Tensor], right: Sequence[Tensor], precision: str = "highest", axes: int = 0
) -> None:
    """Blocks left `[R_i, S_i, A, *]` and right `[R_i, S_i, B, *]`, * of so many axes.

    Raises:
        TypeError: blocks that are not of real floating numbers.
        ValueError: an unknown precision, sides that do not belong together, blocks of different
            widths or on several devices.
    """
    check_blocks(precision, left=left, right=right)
    _check_widths(left, right, dims=3 + axes)


def _check_widths(left: Sequence[Tensor], right: Sequence[Tensor], dims: int) -> None:
    _check_paired(left, right)
    for side in (left, right):
        for i, block in enumerate(side):
            if block.dim() != dims or block.shape[2] != side[0].shape[2]:
                axes = "" if dims == 3 else f", {dims - 3} axes"
                raise ValueError(
                    f"block {i} has shape {tuple(block.shape)}, the first one {tuple(side[0].shape)}, expected "
                    f"[rows, positions, width{axes}], one width in all blocks of a side."
                )


def _check_paired(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    if not left or len(left) != len(right):
        raise ValueError(
            f"found {len(left)} blocks on one side and {len(right)} on the other, expected as many, one at least."
        )
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.dim() < 2 or a.shape[:2] != b.shape[:2]:
            raise ValueError(
                f"the sides of block {i} have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected the same rows and "
                "positions, [R_i, S_i, ...]."
            )


def check_lookups(
    index: Sequence[Tensor], values: Sequence[Tensor], precision: str = "highest"
) -> None:
    """Blocks index `[R_i, S_i]`, whole numbers, and values `[R_i, S_i, D]`.

    Raises:
        TypeError: values that are not of real floating numbers, or an index of another dtype.
        ValueError: an unknown precision, sides that do not belong together, values of different
            widths or on several devices.
    """
    check_blocks(precision, values=values)
    _check_paired(index, values)
    check_devices(values=values, index=index)
    for i, (where, value) in enumerate(zip(index, values, strict=True)):
        if where.is_floating_point() or where.is_complex() or where.dtype == torch.bool:
            raise TypeError(f"block {i} has an index of {where.dtype}, expected whole numbers.")
        check_dense(f"index[{i}]", where)
        if where.dim() != 2 or value.dim() != 3 or value.shape[2] != values[0].shape[2]:
            raise ValueError(
                f"block {i} has index {tuple(where.shape)} and values {tuple(value.shape)}, expected [rows, positions] "
                "and [rows, positions, width], one width in all blocks."
            )


# ---- convolutions --------------------------------------------------------------------------------


def check_images(
    x: Sequence[Tensor],
    b: Sequence[Tensor],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    precision: str,
) -> None:
    """Blocks x `[R_i, F, C, *]` and b `[R_i, F, O, *]`, b on the grid on which the kernel walks over x.

    Raises:
        TypeError: blocks that are not of real floating numbers.
        ValueError: an unknown precision, sides that do not belong together, another grid, or a
            walk too far to be counted or held.
    """
    check_blocks(precision, x=x, b=b)
    _check_walk(kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    _check_widths(x, b, dims=3 + len(kernel))
    span = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    for i, (image, gradient) in enumerate(zip(x, b, strict=True)):
        sizes = image.shape[3:]
        padded = [n + 2 * p for n, p in zip(sizes, padding, strict=True)]
        grid = [
            max((n - reach) // step + 1, 0)
            for n, reach, step in zip(padded, span, stride, strict=True)
        ]
        if list(gradient.shape[3:]) != grid:
            raise ValueError(
                f"block {i} has images of {tuple(sizes)} and gradients of {tuple(gradient.shape[3:])}, expected "
                f"{tuple(grid)} for {len(grid)} axes."
            )
        most = max(FEW_PIXELS, PADDED * prod(sizes))
        _check_room("padding", f"x[{i}] with it has {tuple(padded)} pixels", prod(padded), most)
        _check_room("kernel, dilation", f"they span {tuple(span)} pixels", prod(span), most)
        meetings = prod(grid) * prod(kernel)
        _check_room("kernel", f"{prod(kernel)} taps at {tuple(grid)} positions", meetings, MOST_MEETINGS)  # fmt: skip


def _check_walk(**walk: Sequence[int]) -> None:
    """As many numbers an axis of each, of which only padding may be 0."""
    found = [list(part) for part in walk.values()]
    alike = len({len(part) for part in found}) == 1
    if not alike or any(_too_small(name, part) for name, part in walk.items()):
        raise ValueError(
            f"kernel, stride, padding and dilation are {found}, expected one number per axis each, of which only "
            "padding may be 0."
        )
    for name, part in walk.items():
        if max(part, default=0) > MOST_STEP:
            raise ValueError(f"{name} is {list(part)}, expected at most {MOST_STEP} along an axis.")


def _too_small(name: str, part: Sequence[int]) -> bool:
    """Whether a number is below what may stand there."""
    return min(part, default=1) < (0 if name == "padding" else 1)


def _check_room(name: str, found: str, size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"{name}: {found}, {size} together, expected at most {most}.")


def check_groups(groups: int, inputs: int, outputs: int) -> None:
    """Groups that divide both numbers of channels.

    Raises:
        ValueError: they do not.
    """
    if groups < 1 or inputs % groups or outputs % groups:
        raise ValueError(
            f"groups is {groups}, expected a divisor of {inputs} and of {outputs} channels."
        )
